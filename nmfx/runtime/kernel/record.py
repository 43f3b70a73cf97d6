"""What the kernel's libraries were when they were built: SHA256SUMS beside them, as sha256sum writes it.

A library that is cut short or altered ends the process when it is loaded or called (SIGBUS, SIGILL, SIGSEGV), so it is looked
at before. What builds libraries writes the record: `hatch_build.py` and `make kernel` run this file, which needs no package.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from pathlib import Path

RECORD = "SHA256SUMS"


def digest_of(content: bytes) -> str:
    """SHA-256 in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def write_record(folder: Path) -> None:
    """Record the libraries of a folder as they are."""
    lines = [f"{digest_of(path.read_bytes())}  {path.name}\n" for path in sorted(folder.glob("*.so"))]
    (folder / RECORD).write_text("".join(lines), encoding="utf-8")


def damage_of(path: Path, content: bytes, digest: str) -> str:
    """What is wrong with the content of a library, of this digest, and what to do; empty where nothing is known to be.

    One that is not recorded, as CMake alone leaves it, is only known to be cut short.
    """
    try:
        lines = (path.parent / RECORD).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    recorded = {name: said for said, _, name in (line.partition("  ") for line in lines)}.get(path.name)
    if recorded is not None and recorded != digest:
        return (
            f"{path} is damaged: not what {RECORD} beside it says; install nmfx anew (or `make kernel`, if CMake built it anew)"
        )
    if recorded is None and _is_cut_short(content):
        return f"{path} is damaged: cut short; install nmfx anew (or `make kernel`)"
    return ""


def _is_cut_short(content: bytes) -> bool:
    """Whether a 64-bit ELF file ends before its table of sections does, which linkers write last."""
    if content[:5] != b"\x7fELF\x02" or len(content) < 64:
        return False  # the system says what it is
    (start,), (size, count) = struct.unpack_from("<Q", content, 0x28), struct.unpack_from("<HH", content, 0x3A)
    return bool(start + size * count > len(content))


if __name__ == "__main__":
    write_record(Path(sys.argv[1]))
