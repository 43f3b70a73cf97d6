"""Laws of words shown: one line, nothing that a terminal acts on, and what is harmless as it was."""

from __future__ import annotations

import os
import pickle

from hypothesis import given, settings
from hypothesis import strategies as st

from nmfx import errors
from nmfx.text import printable


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.one_of(st.text(), st.binary().map(os.fsdecode), st.text(alphabet="\x1b\n\r\t\x7f\x9b\u202e\u2028\udc80[31m")))
def test_any_words_become_one_printable_line(words: str) -> None:
    shown = printable(words)
    assert shown.isprintable()
    assert printable(shown) == shown
    shown.encode()
    assert not words.isprintable() or shown == words


def test_what_is_shown_of_bytes() -> None:
    assert printable(os.fsdecode(b"\xff\x1b[31m\n\xc3\xa9 caf\xc3\xa9")) == "\\xff\\x1b[31m\\né café"


def test_every_error_of_ours_is_printable_and_keeps_its_words() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.NmfxError)]
    assert len(kinds) > 5
    for kind in kinds:
        error = kind("a\x1bb: not found")
        assert str(error) == "a\\x1bb: not found"
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
        assert error.args == ("a\x1bb: not found",)
