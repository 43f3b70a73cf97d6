"""Files and folders written whole or not at all; whatever takes long is done in a draft first (see `drafts`)."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from nmfx.errors import NmfxError
from nmfx.files.drafts import MARK, NEW, OLD, new_draft

EXCHANGE = 2  # of renameat2: both names are there at every moment
HERE = -100  # of renameat2: paths are as they are seen from the current folder


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
    with _system_errors(path), new_draft(path.parent) as draft:
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
    with _system_errors(folder):
        here = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
        with new_draft(here) as draft:
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
        with _system_errors(folder):
            draft = stack.enter_context(new_draft(folder))
        yield draft / NEW


@contextlib.contextmanager
def all_or_nothing(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files, those in folders in it too, move to `folder` when the block ends well, or vanish.

    Raises:
        NmfxError: `folder` cannot be written to.
    """
    try:
        with draft_in(folder) as draft:
            yield draft
            with _system_errors(folder):
                files = sorted(path for path in draft.rglob("*") if not path.is_dir())
                for file in files:
                    _sync(file)
                for file in files:
                    place = folder / file.relative_to(draft)
                    place.parent.mkdir(exist_ok=True)
                    os.replace(file, place)
                for place in {folder, *(folder / file.relative_to(draft).parent for file in files)}:
                    _sync(place)
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
    with _system_errors(path), new_draft(path.parent, path.name) as draft:
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
def _system_errors(path: Path) -> Iterator[None]:
    """Errors of the operating system become one NmfxError that names `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise NmfxError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from error


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
