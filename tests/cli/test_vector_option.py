"""Masks that rows share, as a user types them: --vector, --pattern 2:4x4, and what shows them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest

from nmfx.cli.main import main
from nmfx.demo.digits import load_demo
from nmfx.export.checkpoint import load_checkpoint
from nmfx.models.census import find_sites
from nmfx.passes.verification import verify
from nmfx.scheme import Scheme

Nmfx = Callable[..., str]


def vectors(path: str) -> set[int]:
    return {pattern.vector for pattern in Scheme.load(Path(path), find_sites(load_demo(trained=True))).values()}


def test_from_search_to_file(nmfx: Nmfx) -> None:
    out = nmfx("search", "--target", "0.6", "--m", "8", "--vector", "4")
    assert "2:8x4" in out
    assert vectors("digits.nmfx/scheme.yaml") == {4}
    assert not Path("digits.nmfx/scheme.txt").exists()  # the published format cannot say it
    nmfx("correct", "--data", "digits", "--pictures", "64")
    nmfx("export")
    (file,) = Path("digits.nmfx/export").glob("*.safetensors")
    assert "2:8x4" in nmfx("inspect", str(file))
    model = load_checkpoint(file)
    assert {verify(model).sites} == {len(Scheme.load(Path("digits.nmfx/scheme.yaml")))}
    assert "2:8x4" in nmfx("inspect", "digits.nmfx")
    nmfx("search", "--target", "0.6", "--m", "8", "-o", "alone.yaml")
    assert vectors("alone.yaml") == {1}
    assert "x4" in nmfx("compare", "alone.yaml", "digits.nmfx/scheme.yaml", "--model", "digits.nmfx")
    nmfx("convert", "demo:digits", "--weights", str(file), "-o", "sparser")  # a compressed start keeps its V
    nmfx("search", "sparser", "--target", "0.75")
    assert vectors("sparser/scheme.yaml") == {4}


def test_one_pattern_for_all(nmfx: Nmfx) -> None:
    out = nmfx("convert", "demo:digits", "--pattern", "2:4x4")
    assert "2:4x4" in out
    assert vectors("digits.nmfx/scheme.yaml") == {4}
    nmfx("search", "digits.nmfx", "--patterns", "2:4x2,1:4x2", "--target", "0.5", "--force")
    assert vectors("digits.nmfx/scheme.yaml") == {2}


def test_several_are_chosen_among(nmfx: Nmfx) -> None:
    out = nmfx("search", "--target", "0.7", "--patterns", "4:8,1:8x4")
    assert vectors("digits.nmfx/scheme.yaml") == {1, 4}
    assert "1:8x4" in out
    nmfx("search", "--target", "0.6", "--m", "8", "--vector", "1,4", "--force")  # both keep as many weights
    assert vectors("digits.nmfx/scheme.yaml") == {1}
    nmfx("search", "--target", "0.4", "--for", "tensorrt", "--vector", "1,2", "--force")
    assert vectors("digits.nmfx/scheme.yaml") <= {1, 2}


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--vector", "3"], "expected how many adjacent outputs share a mask: one of 1, 2, 4, 8"),
        (["--vector", "1,3"], "expected how many adjacent outputs share a mask: one of 1, 2, 4, 8, or several"),
        (["--vector", "1,x"], "expected whole numbers with commas"),
        (["--patterns", "2:4x4,1:4", "--method", "erk"], "masks shared by 1, 4 rows: give all patterns one V; knapsack and"),
        (["--vector", "1,4", "--method", "domino"], "masks shared by 1, 4 rows: give all patterns one V"),
        (["--vector", "1,4", "--method", "domino", "--data", "digits"], "masks shared by 1, 4 rows: give all patterns one V"),
        (["--patterns", "2:4x4", "--vector", "4"], "--patterns says all patterns; leave --m, --candidates and --vector out"),
        (["--patterns", "2:4x5"], "5 rows cannot share a mask"),
    ],
)
def test_what_cannot_be_asked(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):  # what a parser refuses
        assert main(["search", *argv]) == 1
    assert said in capsys.readouterr().err.replace("\n", " ")
