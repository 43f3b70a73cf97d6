"""Laws of stamps: `nmfx run` goes on from what commands made, where settings and inputs are equal, and only there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

RECIPE = """model: {name: demo:digits}
search: {target: 0.75, method: domino}
data: {name: digits}
correct: false
finetune: {epochs: 1, batch_size: 64, lr: 0.02}
export: {baked: true}
"""
TUNE = ("finetune", "--data", "digits", "--epochs", "1", "--batch-size", "64", "--lr", "0.02")
SEARCH = ("search", "--target", "0.75", "--method", "domino")
ALL = ("build", "search", "finetune", "export", "evaluate")
Run = Callable[..., str]


@pytest.fixture
def ran(nmfx: Run) -> Callable[[], list[str]]:
    """Run the recipe in the work directory of the commands; the stages that had to run."""
    Path("mine.yaml").write_text(RECIPE)

    def run() -> list[str]:
        out = nmfx("run", "mine.yaml", "-o", "digits.nmfx").splitlines()
        assert sum(line.split(":")[0] in ALL for line in out) == 5
        return [line.split(":")[0] for line in out if line.split(":")[0] in ALL and ": skipped" not in line]

    return run


def test_what_commands_did_is_not_done_again(nmfx: Run, ran: Callable[[], list[str]]) -> None:
    for argv in (("convert", "digits"), SEARCH, TUNE, ("export", "--baked")):
        nmfx(*argv)
    assert ran() == ["evaluate"]
    assert ran() == []
    nmfx("run", "mine.yaml", "-o", "whole.nmfx")
    for name in ("finetune/model", "export/digits"):
        ours, whole = (load_file(f"{folder}/{name}.safetensors") for folder in ("digits.nmfx", "whole.nmfx"))
        assert all(value.equal(ours[key]) for key, value in whole.items())
    assert not list(Path("digits.nmfx").rglob("*.kept"))


def test_a_pattern_for_all_is_a_search(nmfx: Run) -> None:
    nmfx("convert", "digits", "--pattern", "2:4")
    Path("mine.yaml").write_text("model: {name: demo:digits}\nsearch: {pattern: 2:4}\n")
    out = nmfx("run", "mine.yaml", "-o", "digits.nmfx")
    assert out.count("skipped") == 2
    assert "export: there is no output yet" in out


@pytest.mark.parametrize(
    ("commands", "again"),
    [
        ([("search", "--target", "0.5")], ALL[1:]),
        ([("search", "--target", "0.75")], ALL[1:]),
        ([SEARCH, (*TUNE, "--weight-decay", "0")], ALL[2:]),
        ([SEARCH, TUNE, ("search", "--target", "0.8", "--force")], ("search", *ALL[3:])),  # trained under what is found again
        ([SEARCH, (*TUNE, "--scheme", "dense")], ALL[2:]),
        ([SEARCH, TUNE, ("recalibrate", "--data", "digits"), ("export",)], ALL[3:]),
    ],
)
def test_what_is_not_equal_is_done_again(
    commands: list[tuple[str, ...]], again: tuple[str, ...], nmfx: Run, ran: Callable[[], list[str]]
) -> None:
    for argv in (("convert", "digits"), *commands):
        nmfx(*argv)
    assert ran() == list(again)


def test_training_under_a_scheme_that_was_altered_leaves_no_stamp(nmfx: Run, ran: Callable[[], list[str]]) -> None:
    """Else the run would make the scheme anew, and find it equal to the one that the stamp names."""
    nmfx("convert", "digits")
    nmfx(*SEARCH)
    scheme = Path("digits.nmfx/scheme.yaml")
    scheme.write_text(scheme.read_text().replace("target: ", "target:  "))
    nmfx(*TUNE)
    assert ran() == list(ALL[1:])
