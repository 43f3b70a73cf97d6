# make demo: the main job on real digits, from nothing, in a minute.   make test: lint, types, import contract, tests.
VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.14.1 torchvision==0.29.1 timm==1.0.31
BIN := $(VENV)/bin

.PHONY: demo test lint slow

demo: $(VENV)/.ready
	$(BIN)/python examples/digits.py

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

slow: $(VENV)/.ready
	$(BIN)/python -m pytest -m slow --timeout=3600

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	$(BIN)/python -m pip install --quiet --no-deps foolbox==3.3.4  # only for its 20 labelled ImageNet pictures
	touch $@
