"""Files written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from nmfx.errors import NmfxError


def write_atomic(path: Path, write: Callable[[Path], None], *, force: bool = True) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it: a killed or failed run leaves what was there.

    Raises:
        NmfxError: `path` exists and `force` is false, or it cannot be written (no folder, no space, no permission).
    """
    if path.exists() and not force:
        raise NmfxError(f"{path} exists already; give --force to overwrite it, or another name")
    folder = draft_beside(path)
    try:
        write(folder / path.name)
        (folder / path.name).chmod(0o666 & ~_umask())
        os.replace(folder / path.name, path)
    except (OSError, SafetensorError) as error:
        raise NmfxError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_writable(folder: Path, names: Iterable[str], *, size: int = 0) -> None:
    """Find out now whether these files, `size` bytes or more in all, can be written to a folder, and leave nothing behind.

    Raises:
        NmfxError: no permission, no space, a file where the folder should be, a folder where a file should be.
    """
    for name in names:
        if (folder / name).is_dir():
            raise NmfxError(f"{folder / name}: a file is to be written there, but it is a folder; move it away")
    try:
        here = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not here.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{here} is not a folder")
        with tempfile.TemporaryDirectory(prefix=".probe.", dir=here) as probe:
            for name in names:
                (Path(probe) / name).write_bytes(bytes(4096))
        free = shutil.disk_usage(here).free
    except OSError as error:
        raise NmfxError(f"{folder}: cannot be written: {error.strerror or error}") from error
    if free < size:
        raise NmfxError(f"{folder}: {size:,} bytes are to be written there, and {free:,} are free; make room first")


def draft_beside(path: Path) -> Path:
    """A new temporary folder beside `path`, on the same disk, so that a rename finishes the job.

    Raises:
        NmfxError: the folder of `path` cannot be made or written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise NmfxError(f"{path}: cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def all_or_nothing(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files move to `folder` when the block ends well, and vanish when it does not.

    Raises:
        NmfxError: `folder` cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".draft.", dir=folder))
    except OSError as error:
        raise NmfxError(f"{folder}: cannot be written: {error.strerror or error}") from error
    try:
        yield draft
        for file in sorted(draft.iterdir()):
            os.replace(file, folder / file.name)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.rmdir()  # if it was empty before, it is gone again
        raise
    shutil.rmtree(draft, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
