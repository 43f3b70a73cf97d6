"""Drafts: where results are made, and how those of killed processes are found and removed by the next one that writes there.

A draft is a folder `.nmfx-draft-*` beside the result, on the same disk. The file `nmfx` in it says whose it is and is locked as
long as its process lives, so nobody removes a draft in use, nor a folder that nmfx did not make.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: no locks, and so no draft is known to be dead
    fcntl = None  # type: ignore[assignment]

DRAFT, MARK = ".nmfx-draft-", "nmfx"  # a draft's name, and the file in it that is locked
NEW, OLD = "new", "old"  # in a draft: what is being written, and the folder that it replaces
LONGEST = 4096  # bytes of a mark
NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
POLL = 0.05  # seconds


@contextlib.contextmanager
def new_draft(folder: Path, replaces: str = "") -> Iterator[Path]:
    """A new draft in `folder` with an empty `NEW`, marked and locked as long as the block lasts."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_dead_drafts(folder)
    mark = None
    while mark is None:
        draft = Path(tempfile.mkdtemp(prefix=DRAFT, dir=folder))
        mark = _marked(draft, replaces)
    try:
        yield draft
    finally:
        _put_back(draft, replaces)
        _remove(draft)
        os.close(mark)


def remove_dead_drafts(folder: Path) -> None:
    """Remove the drafts in `folder` whose processes have died; a folder that one of them had taken away is put back."""
    if fcntl is None:
        return
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in [entry for entry in entries if entry.name.startswith(DRAFT)]:
            if entry.is_dir(follow_symlinks=False):
                _remove_if_dead(Path(entry.path))


def _marked(draft: Path, replaces: str) -> int | None:
    """The locked mark of a new draft, and `NEW` beside it; None if another process took it for a dead one meanwhile."""
    try:
        mark = os.open(draft / MARK, os.O_RDWR | os.O_CREAT | os.O_EXCL | NO_LINK, 0o666)  # so its mode shows the umask
    except FileNotFoundError:
        return None
    _lock(mark, wait=True)
    if not os.fstat(mark).st_nlink:
        os.close(mark)
        return None
    os.write(mark, json.dumps({"made by": "nmfx", "process": os.getpid(), "replaces": replaces}).encode())
    os.fsync(mark)
    (draft / NEW).mkdir()
    return mark


def _remove_if_dead(draft: Path) -> None:
    try:
        mark = os.open(draft / MARK, os.O_RDWR | os.O_NONBLOCK | NO_LINK)
    except FileNotFoundError:  # killed before it was marked
        with contextlib.suppress(OSError):
            draft.rmdir()
        return
    except OSError:
        return
    try:
        if not _lock(mark):
            return
        if (replaces := _read_mark(mark)) is not None:
            _put_back(draft, replaces)
            _remove(draft)
        elif not os.fstat(mark).st_size and os.listdir(draft) == [MARK]:  # killed before it was written
            _remove(draft)
    finally:
        os.close(mark)


def _read_mark(mark: int) -> str | None:
    """Which folder the draft of a mark replaces, if any; None if it is not a mark of this user's."""
    about = os.fstat(mark)
    if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid() or about.st_nlink != 1 or about.st_size > LONGEST:
        return None
    try:
        said = json.loads(os.pread(mark, LONGEST, 0))
        name = said["replaces"] if said["made by"] == "nmfx" else None
    except (ValueError, KeyError, TypeError):
        return None
    return name if isinstance(name, str) and name == os.path.basename(name) and name not in (".", "..") else None


def _put_back(draft: Path, replaces: str) -> None:
    """The folder that was taken away, when no new one has come in its place."""
    if replaces and (draft / OLD).is_dir() and not os.path.lexists(draft.parent / replaces):
        with contextlib.suppress(OSError):
            os.rename(draft / OLD, draft.parent / replaces)


def _remove(draft: Path) -> None:
    """Remove a draft, its mark last; what else lies in it was not put there by us and stays."""
    for part in (draft / NEW, draft / OLD):
        with contextlib.suppress(OSError):
            part.unlink() if part.is_symlink() else shutil.rmtree(part)
    with contextlib.suppress(OSError):
        if os.listdir(draft) == [MARK]:
            (draft / MARK).unlink()
            draft.rmdir()


@contextlib.contextmanager
def locked(path: Path, limit: float) -> Iterator[bool]:
    """Hold the lock file at `path`; false if others still hold it after `limit` seconds. One that dies lets go of it."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | NO_LINK, 0o600)
    except OSError:  # nothing can be written there: there is nothing to take turns for
        yield False
        return
    try:
        end = time.monotonic() + limit
        while not (mine := _lock(file)) and time.monotonic() < end:
            time.sleep(POLL)
        yield mine
    finally:
        os.close(file)


def _lock(file: int, *, wait: bool = False) -> bool:
    """Lock an open file unless another process has; true on a disk without locks if one may `wait`, as nobody else can lock."""
    if fcntl is None:
        return wait
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return wait
    return True
