"""Words: known keys, nearest names, quotes."""

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
            raise error(f"{origin}: unknown key {key!r}{nearest(key, known)}; known: {', '.join(known)}")


def nearest(word: str, known: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"``, or nothing when no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


def quote(word: str) -> str:
    """`word` as a YAML scalar that every YAML version reads as text."""
    return word if re.fullmatch(r"[A-Za-z_][\w.]*", word) and "." in word else json.dumps(word)
