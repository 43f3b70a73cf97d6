"""Words: known keys, nearest names, quotes, and what may be shown of a foreign name."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from typing import Any


def check_keys(tree: dict[str, Any], known: Iterable[str], origin: str, error: type[Exception]) -> None:
    """Raise `error` for the first key that is not known, with the nearest one that is."""
    known = list(known)
    for key in tree:
        if key not in known:
            raise error(f"{origin}: unknown key {key[:80]!r}{nearest(key[:80], known)}; known: {', '.join(known)}")


def nearest(word: str, known: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"``, or nothing when no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


def quote(word: str) -> str:
    """`word` as a YAML scalar that every YAML version reads as text."""
    return word if re.fullmatch(r"[A-Za-z_][\w.]*", word) and "." in word else json.dumps(word)


def printable(words: str) -> str:
    """`words` in one line that is safe to show: control and escape characters, and bytes that are no text, as escapes.

    A file may be called anything: ``"\\x1b[31m"`` would colour the terminal, a newline forge a line of ours, and a byte that is
    not UTF-8 (a surrogate in Python) could not be written at all.
    """
    return words if words.isprintable() else "".join(c if c.isprintable() else _escape(c) for c in words)


def _escape(character: str) -> str:
    byte = ord(character) - 0xDC00  # of a byte that is not UTF-8, as os.fsdecode keeps it
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else character.encode("unicode_escape").decode()
