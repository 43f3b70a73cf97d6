"""Laws of the pattern: one value per N:M, written and read the same, N first."""

from __future__ import annotations

import copy
import pickle

import pytest

from nmfx.errors import NmfxError, PatternError
from nmfx.sparsity.pattern import MAX_M, Pattern


def test_every_pattern_survives_text() -> None:
    for m in range(1, MAX_M + 1):
        for n in range(1, m + 1):
            pattern = Pattern(n, m)
            assert Pattern(str(pattern)) == pattern == Pattern(pattern) == eval(repr(pattern))
            assert (pattern.n, pattern.m) == (n, m)
            assert pattern.density + pattern.sparsity == 1
            assert pattern.is_dense == (n == m)


@pytest.mark.parametrize("text", ["2:4", " 2:4 ", "2 : 4", "02:04"])
def test_spellings(text: str) -> None:
    assert Pattern(text) == Pattern(2, 4)


def test_it_is_a_value() -> None:
    pattern = Pattern("4:16")
    assert {pattern: 1}[Pattern(4, 16)] == 1
    assert pattern != Pattern("1:4")  # of the same density, another choice
    assert pickle.loads(pickle.dumps(pattern)) == pattern == copy.deepcopy(pattern)
    assert f"{pattern}" == "4:16"
    with pytest.raises(AttributeError):
        pattern.n = 2  # type: ignore[misc]
    assert Pattern.DENSE.is_dense


NOT_PATTERNS = ["", "2", "2-4", "2:4:8", "a:b", "-1:4", "2.0:4", "2:", ":4", "dense", "0:4", "0:0", "1:65", "1000:1000"]


@pytest.mark.parametrize("text", NOT_PATTERNS)
def test_what_is_no_pattern(text: str) -> None:
    with pytest.raises(PatternError) as caught:
        Pattern(text)
    assert isinstance(caught.value, NmfxError)
    assert isinstance(caught.value, ValueError)
    assert repr(text) in str(caught.value)


def test_a_swapped_pattern_is_recognised() -> None:
    with pytest.raises(PatternError, match="did you mean '2:4'"):
        Pattern("4:2")


@pytest.mark.parametrize("pair", [(2.0, 4), (True, 4), (None, 4), (0, 4), (5, 4)], ids=str)
def test_numbers_out_of_range(pair: tuple[object, int]) -> None:
    with pytest.raises(PatternError):
        Pattern(*pair)  # type: ignore[arg-type]
