"""Files and folders written whole or not at all; what a killed process leaves is removed by the next one that writes there.

Whatever takes long is done in a draft: a folder `.nmfx-draft-*` beside the result, on the same disk. The file `nmfx` in it says
whose it is and is locked as long as its process lives, so nobody removes a draft in use, nor a folder that nmfx did not make.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from nmfx.errors import NmfxError

try:
    import fcntl
except ImportError:  # Windows: no locks, and so no draft is known to be dead
    fcntl = None  # type: ignore[assignment]

DRAFT, MARK = ".nmfx-draft-", "nmfx"  # a draft's name, and the file in it that is locked
NEW, OLD = "new", "old"  # in a draft: what is being written, and the folder that it replaces
EXCHANGE = 2  # of renameat2: both names are there at every moment
HERE = -100  # of renameat2: paths are as they are seen from the current folder
LONGEST = 4096  # bytes of a mark
NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
POLL = 0.05  # seconds


def write_atomic(path: Path, write: Callable[[Path], object], *, force: bool = True, mode: int = 0o666) -> None:
    """Let `write` fill a temporary file, then rename it: a killed or failed run leaves what was there.

    A link at `path` is replaced by the file; what it leads to stays as it is.

    Args:
        mode: permissions, of which the umask takes some away.

    Raises:
        NmfxError: `path` exists and `force` is false, it is no file (a device, a pipe, a folder), or it cannot be written (no
            folder, no space, no permission).
    """
    if os.path.lexists(path) and not (path.is_symlink() or path.is_file()):
        raise NmfxError(f"{path}: cannot be written: a folder, pipe or device is there, and is not replaced; give another name")
    taken = NmfxError(f"{path} exists already; give --force to overwrite it, or another name")
    if not force and os.path.lexists(path):
        raise taken
    with _said(path), _draft(path.parent) as draft:
        new = draft / NEW / path.name
        write(new)
        new.chmod((draft / MARK).stat().st_mode & mode)
        _sync(new)
        if force:
            os.replace(new, path)
        elif not _put_where_free(new, path):
            raise taken
        _sync(path.parent)


def write_text(path: Path, content: str, *, force: bool = True) -> None:
    """`write_atomic` of a text, in UTF-8."""
    write_atomic(path, lambda draft: draft.write_text(content, encoding="utf-8"), force=force)


def check_writable(folder: Path, names: Iterable[str] = (), *, size: int = 0) -> None:
    """Find out now whether these files, `size` bytes or more in all, can be written to a folder, and leave nothing behind.

    Raises:
        NmfxError: no permission, no space, a file where the folder should be, a folder where a file should be.
    """
    for name in names:
        if (folder / name).is_dir():
            raise NmfxError(f"{folder / name}: a file is to be written there, but it is a folder; move it away")
    with _said(folder):
        here = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
        with _draft(here) as draft:
            (draft / NEW / "probe").write_bytes(bytes(4096))
        free = shutil.disk_usage(here).free
    if free < size:
        raise NmfxError(f"{folder}: {size:,} bytes are to be written there, and {free:,} are free; make room first")


@contextlib.contextmanager
def draft_in(folder: Path) -> Iterator[Path]:
    """A folder on the disk of `folder` for what is being made; removed when the block ends, or by others if it never does.

    Raises:
        NmfxError: `folder` cannot be written to.
    """
    with contextlib.ExitStack() as stack:
        with _said(folder):
            draft = stack.enter_context(_draft(folder))
        yield draft / NEW


@contextlib.contextmanager
def all_or_nothing(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files move to `folder` when the block ends well, and vanish when it does not.

    Raises:
        NmfxError: `folder` cannot be written to.
    """
    try:
        with draft_in(folder) as draft:
            yield draft
            with _said(folder):
                files = sorted(draft.iterdir())
                for file in files:
                    _sync(file)
                for file in files:
                    os.replace(file, folder / file.name)
                _sync(folder)
    except BaseException:
        with contextlib.suppress(OSError):
            folder.rmdir()  # if it was empty before, it is gone again
        raise


def replace_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a new folder, then put it in the place of the one at `path`, if any, which is removed.

    At every moment one of the two is at `path`. Only where the system cannot exchange two names may a process that is killed
    leave neither; then the next one that writes beside it puts the old one back.

    Raises:
        NmfxError: it cannot be written.
    """
    if path.name in ("", ".."):
        raise NmfxError(f"{path}: cannot be replaced from inside; go out of it and give its name")
    with _said(path), _draft(path.parent, path.name) as draft:
        new = draft / NEW
        write(new)
        _sync_tree(new)
        if not os.path.lexists(path):
            os.rename(new, path)
        elif not _exchanged(new, path):
            os.rename(path, draft / OLD)
            _sync(path.parent)
            os.rename(new, path)
        _sync(path.parent)


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


def remove_dead_drafts(folder: Path) -> None:
    """Remove the drafts in `folder` whose processes have died; a folder that one of them had taken away is put back."""
    if fcntl is None:
        return
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in [entry for entry in entries if entry.name.startswith(DRAFT)]:
            if entry.is_dir(follow_symlinks=False):
                _remove_if_dead(Path(entry.path))


@contextlib.contextmanager
def _said(path: Path) -> Iterator[None]:
    """Errors of the system as one of ours."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise NmfxError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from error


@contextlib.contextmanager
def _draft(folder: Path, replaces: str = "") -> Iterator[Path]:
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


def _lock(file: int, *, wait: bool = False) -> bool:
    """Lock an open file unless another process has; true on a disk without locks if one may `wait`, as nobody else can lock."""
    if fcntl is None:
        return wait
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return wait
    return True


def _put_where_free(new: Path, path: Path) -> bool:
    """Give a file its name unless that is taken, at once where the disk knows hard links."""
    try:
        os.link(new, path)
    except FileExistsError:
        return False
    except OSError:
        if os.path.lexists(path):
            return False
        os.replace(new, path)
    return True


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange the names of two folders at once; false where the system or the disk cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    if not rename(HERE, os.fsencode(one), HERE, os.fsencode(other), EXCHANGE):
        return True
    if (code := ctypes.get_errno()) not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):
        raise OSError(code, os.strerror(code))
    return False


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk; not every system can say so of folders."""
    try:
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise


def _sync_tree(folder: Path) -> None:
    for where, _, files in os.walk(folder):
        for name in files:
            _sync(Path(where, name))
        _sync(Path(where))
