"""Words: known keys, nearest names, quotes, and what may be shown of a foreign name."""

from __future__ import annotations

import difflib
import fnmatch
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


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """``" (did you mean 'x'?)"``, or nothing when no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f" (did you mean {near[0]!r}?)" if near else ""


def matches(name: str, glob: str) -> bool:
    """Whether a glob matches a weight's name, or the name of a module that it is under: ``fc`` is ``fc.weight``."""
    return fnmatch.fnmatchcase(name, glob) or fnmatch.fnmatchcase(name, f"{glob}.*")


def unmatched(glob: str, names: Iterable[str]) -> str:
    """What to say after "no site matches": the names and modules that are near, or else the first and last names."""
    names = list(names)
    inside = [name for name in names if glob.strip("*") and glob.strip("*").lower() in name.lower()]
    modules = (name.split(".")[:depth] for name in names for depth in range(1, name.count(".") + 1))
    known = [*names, *dict.fromkeys(".".join(parts) for parts in modules)]
    near = inside[:3] or difflib.get_close_matches(glob, known, n=1, cutoff=0.6)
    if near:
        return f" (did you mean {' or '.join(map(repr, near))}?)"
    return f"; they are {', '.join(names if len(names) < 4 else [*names[:2], '...', names[-1]])}" if names else ""


def sentence(error: BaseException, most: int = 240) -> str:
    """What an error says first, without escape codes: as many whole sentences of its first line as fit, or else whole words."""
    said = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip() or type(error).__name__
    said = re.split(r"(?<![,:])\s*\n", said)[0]  # a line that ends so goes on in the next one
    said = " ".join(said.split())
    if len(said) > most:
        ends = [found.end(1) for found in re.finditer(r"([.!?;])(?= )", said[: most + 1])]
        said = said[: ends[-1]].rstrip(";") if ends else f"{said[:most].rpartition(' ')[0] or said[:most]} ..."
    return said.removesuffix(".")


def count(number: float) -> str:
    """A count in three or four significant figures: 25.5M, 4.09G, 640."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size * 0.9995:
            return f"{number / size:.3g}{unit}" if number / size < 999.5 else f"{number / size:.0f}{unit}"
    return f"{number:.0f}"


def size(number: int) -> str:
    """Bytes as MB or kB (decimal)."""
    return f"{number / 1e6:.2f} MB" if number >= 1e5 else f"{number / 1e3:.1f} kB"


def percent(share: float) -> str:
    """``99.8%``; ``100%`` is all of it, never a rounded figure."""
    return "100%" if share == 1 else f"{min(share, 0.999):.1%}"


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
