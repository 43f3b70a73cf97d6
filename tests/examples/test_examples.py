"""The examples run as a reader would run them, warnings being errors."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nmfx import load_checkpoint, scheme_of
from nmfx.demo.digits import DigitsNet

ROOT = Path(__file__).parents[2]
ROWS = ["dense", "uniform 2:16", "Domino", "knapsack"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[str, Path]:
    """What a short run of examples/digits.py prints, and the folder of its checkpoints."""
    out = tmp_path_factory.mktemp("digits")
    command = [sys.executable, "-W", "error", "examples/digits.py", "--epochs", "6", "--tune-epochs", "2", "--out", str(out)]
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "FORCE_COLOR")} | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout, out


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
