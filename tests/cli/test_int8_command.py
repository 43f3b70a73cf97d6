"""int8 from the command line: bench, export and a search for a speed, on the demo network."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import nmfx as library
from nmfx.cli.main import main
from nmfx.stages import latency

Run = Callable[..., str]
AGREES = r"int8 outputs differ by (\d+\.\d+)% from float32 on 64 calibration pictures, the same class for (\d+\.\d)%"
pytestmark = pytest.mark.usefixtures("quick_times")


@pytest.fixture
def digits(nmfx: Run) -> Path:
    """A work directory of the demo network with a scheme whose masks four rows share."""
    nmfx("convert", "digits")
    nmfx("search", "--target", "0.75", "--vector", "4")
    return Path("digits.nmfx")


def agreement(out: str) -> tuple[float, float]:
    found = re.search(AGREES, out)
    assert found, out
    return float(found[1]), float(found[2])


def test_bench_in_int8(digits: Path, nmfx: Run) -> None:
    asked = ("bench", "--batch", "1,8", "--threads", "1", "--turns", "1", "--engines", "none", "--precision", "int8")
    out = nmfx(*asked, "--data", "digits", "--sites")
    difference, same = agreement(out)
    assert difference < 5
    assert same > 95
    assert "5 of 6 sites are computed in int8" in out
    assert re.search(r"block1\.conv\.weight +32x16x3x3 .* int8", out)
    assert "few tokens" in out


def test_bench_in_int8_without_pictures_says_what_its_outputs_are_worth(
    digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--batch", "1", "--threads", "1", "--turns", "1", "--engines", "none", "--precision", "int8"]) == 0
    assert "int8 calibrated on noise: times are right, its outputs are not" in capsys.readouterr().err


def test_export_of_a_compiled_model_in_int8(digits: Path, nmfx: Run) -> None:
    out = nmfx("export", "--compiled", "--precision", "int8", "--data", "digits", "--calibrate", "64")
    assert agreement(out)[0] < 5
    loaded = library.load_compiled("digits.nmfx/export/digits.nmfxc")
    assert sum(one.chosen == "int8" for one in loaded.choices) == 5
    assert loaded(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
    out = nmfx("inspect", "digits.nmfx/export/digits.nmfxc")
    assert re.search(r"int8 +block1\.conv\.weight", out)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["export", "--precision", "int8", "--data", "digits"], "--precision says nothing without --compiled"),
        (["export", "--compiled", "--precision", "int8"], "int8 looks at pictures: say which with --data"),
        (["search", "--target", "0.5", "--precision", "int8"], "--precision int8 counts for times only: give --target-latency"),
    ],
)
def test_what_says_nothing_is_refused(
    argv: list[str], message: str, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 1
    assert message in capsys.readouterr().err
    assert not (digits / "export" / "digits.nmfxc").exists()


def test_search_for_a_speed_in_int8(
    nmfx: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside the engines that are given; a clock that ticks once may find the speed out of reach, and says so."""
    seen = {}

    def rivals(*args: object) -> dict[str, Callable[[], object]]:
        return {"a slow engine": lambda: seen.setdefault("ran", True)}

    monkeypatch.setattr(latency, "int8_engines", rivals)
    nmfx("convert", "digits")
    status = main(["search", "--target-latency", "1.01x", "--precision", "int8", "--vector", "4"])
    said = capsys.readouterr()
    assert "out of reach" in said.err if status else "the best dense run" in said.out
    assert seen == {"ran": True}
