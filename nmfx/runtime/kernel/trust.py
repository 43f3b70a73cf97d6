"""Files that only this user and root could have written, and that are what their names say: a kernel is code."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from pathlib import Path

from nmfx.errors import NmfxError

LARGEST = 1 << 28  # bytes of a kernel, at most


def read_trusted(path: Path) -> bytes:
    """The bytes of a kept kernel.

    Raises:
        NmfxError: others could have written it, or it is damaged.
    """
    for one in (path.parent.parent, path.parent):
        check_ours(one)
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
        about = os.fstat(file.fileno())
        _check_ours(path, about)
        if not stat.S_ISREG(about.st_mode) or about.st_size > LARGEST:
            raise NmfxError(f"{path} is no kernel; remove it")
        content = file.read(LARGEST)
    if digest_of(content) != path.stem.rpartition("-")[2]:
        raise NmfxError(f"{path} is damaged; remove it")
    return content


def check_ours(folder: Path) -> None:
    """Raise an NmfxError if anybody but this user and root can write to a folder, or to the link that leads to it."""
    _check_ours(folder, os.lstat(folder))
    _check_ours(folder, os.stat(folder))


def _check_ours(path: Path, about: os.stat_result) -> None:
    if not hasattr(os, "geteuid"):
        return
    if about.st_uid not in (0, os.geteuid()):
        raise NmfxError(f"{path} belongs to another user ({about.st_uid}) and is not used; set NMFX_CACHE to a folder of yours")
    if about.st_mode & 0o022 and not stat.S_ISLNK(about.st_mode):
        raise NmfxError(f"{path} can be written by others and is not used; chmod go-w it if you trust what is in it")


def make_folder(folder: Path) -> None:
    """Make a folder of kernels and the one around it, writable by this user alone.

    Raises:
        NmfxError: it is there and others can write to it, or this user cannot.
    """
    folder.parent.parent.mkdir(parents=True, exist_ok=True)
    for one in (folder.parent, folder):
        with contextlib.suppress(FileExistsError):
            one.mkdir(0o755)
        check_ours(one)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise NmfxError(f"{folder} cannot be written to; set NMFX_CACHE to a folder of yours")


def digest_of(content: bytes) -> str:
    """What stands for bytes in the name of a kernel."""
    return hashlib.sha256(content).hexdigest()[:32]
