"""A short run of the fuzzer; the long one is a command of its own."""

from __future__ import annotations

import pytest
from fuzz.fuzz import KINDS, fuzz

from nmfx.runtime.measuring import timing

COUNTS = {
    "checkpoints": 200,
    "schemes": 200,
    "recipes": 60,
    "states": 100,
    "work": 60,
    "stamps": 60,
    "times": 60,
    "compiled": 200,
    "int8": 200,
}


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_errors_of_ours_or_what_they_say(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "machine", lambda: {"processor": "of the fuzzer"})  # or the kernel would be built
    outcomes = fuzz(kind, COUNTS[kind], seed=1)
    assert outcomes["refused"] > COUNTS[kind] / 5
    assert outcomes["another valid file"] > 0
