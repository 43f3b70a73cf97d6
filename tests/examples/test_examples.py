"""Laws of examples/digits.py, which `make demo` runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nmfx import load_checkpoint, scheme_of
from nmfx.demo.digits import DigitsNet

ROWS = ["dense", "uniform 2:16", "Domino", "knapsack"]


@pytest.fixture(scope="module")
def demo(example, tmp_path_factory) -> tuple[str, Path]:
    """What a short run prints, and the folder of its checkpoints."""
    out = tmp_path_factory.mktemp("digits")
    return example("digits.py", "--epochs", 6, "--tune-epochs", 2, "--out", out), out


def rows_of(printed: str) -> dict[str, list[float]]:
    """Row name -> one-shot, fine-tuned and its deviation, kept weights, sparsity, MACs kept, file; percentages as they are."""
    found = {name: re.search(rf"^\s*{re.escape(name)}\s+(\d.*)$", printed, re.M) for name in ROWS}
    return {name: [float(re.sub("[%,]|[+]-", "", cell)) for cell in row[1].split()] for name, row in found.items() if row}


def test_digits_prints_one_row_a_scheme(demo):
    rows = rows_of(demo[0])
    assert list(rows) == ROWS
    assert {len(row) for row in rows.values()} == {7}


def test_digits_is_plain_text_of_80_columns_when_piped(demo):
    assert "\x1b" not in demo[0]
    assert max(map(len, demo[0].splitlines())) <= 80
    assert "…" not in demo[0]


def test_digits_compares_at_one_budget(demo):
    rows = rows_of(demo[0])
    assert rows["dense"][3:6] == [37136, 0.0, 100.0]
    assert rows["uniform 2:16"][3] == 4768  # 2:16 of everything but the stem's 144
    assert all(rows[name][3] <= 37136 // 8 for name in ("Domino", "knapsack"))


def test_digits_fine_tunes_back_to_a_working_network(demo):
    for one_shot, tuned, *_ in rows_of(demo[0]).values():
        assert tuned >= max(90, one_shot - 1)


@pytest.mark.parametrize("name", ["dense", "uniform", "domino", "knapsack"])
def test_digits_leaves_checkpoints_that_load(demo, name):
    model = load_checkpoint(demo[1] / f"digits-{name}.safetensors", DigitsNet())
    assert bool(scheme_of(model)) == (name != "dense")
