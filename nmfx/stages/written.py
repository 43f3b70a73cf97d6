"""What the stages of a recipe wrote into its folder: a list of digests, so that a stranger's file is never deleted or replaced.

Whatever is in the way and is not on the list, or is no longer as it was written, gets another name beside its own.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Container, Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from nmfx.errors import NmfxError
from nmfx.files import parsing
from nmfx.files.atomic import write_text
from nmfx.files.drafts import DRAFT
from nmfx.stages.stamp import FOLDER, digest_of, read_stamp

LIST = f"{FOLDER}/written.json"
BOARD = "finetune/tensorboard"
EVENTS = "events.out.tfevents."  # how TensorBoard's files begin
LOG_HEAD = "epoch,train_loss,"


class Written:
    """The list of a folder; files are named by their path in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.digests = parsing.read_json(folder / LIST, dict[str, str], "a list of what was written")
        except NmfxError:  # none yet, or damaged: then nothing is ours, and nothing is lost
            self.digests = _from_stamps(folder)

    def clear(self, *names: str) -> list[str]:
        """Make way for files that are about to be written; says what was not ours, and how it is called now."""
        said = []
        for name in names:
            path = self.folder / name
            if self.ours(name):
                path.unlink()
            else:
                said += set_aside(path)
            self.digests.pop(name, None)
        self._save()
        return said

    def record(self, digests: Mapping[str, str]) -> None:
        """A stage has come to its end: note what it wrote."""
        self.digests |= digests
        self._save()

    def ours(self, name: str) -> bool:
        """Whether a file is there as nmfx wrote it."""
        known, path = self.digests.get(name), self.folder / name
        return known is not None and is_plain(path) and known == digest_of(path)

    def _save(self) -> None:
        content = json.dumps(self.digests, indent=1)
        write_text(self.folder / LIST, content)


def _from_stamps(folder: Path) -> dict[str, str]:
    """The outputs that the stamps of a folder name: earlier versions of nmfx kept no list."""
    digests: dict[str, str] = {}
    for path in sorted((folder / FOLDER).glob("*.json")):
        left = read_stamp(folder, path.stem)
        digests |= left.outputs if left is not None and isinstance(left.outputs, dict) else {}
    return digests


def check_folders(folder: Path, names: Iterable[str]) -> None:
    """Raise unless the folders of this name in `folder` are there, or can be made: a link would lead what is written elsewhere.

    Raises:
        NmfxError: one of them is a link, or no folder.
    """
    for path in (folder / name for name in names):
        if path.is_symlink():
            raise NmfxError(
                f"{path} is a link to {os.readlink(path)}: nothing is written or deleted behind it; remove the link"
            )
        if path.exists() and not path.is_dir():
            raise NmfxError(f"{path} is no folder, and nmfx needs one of that name; move it")


def strangers(folder: Path, known: Container[str]) -> list[str]:
    """The files and links below `folder`, by their path in it, that are not `known`, nor TensorBoard's or drafts."""
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(DRAFT)]
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        for name in [*files, *links]:
            path = os.path.relpath(os.path.join(place, name), folder)
            if path not in known and not path.startswith(f"{BOARD}/{EVENTS}"):
                found.append(path)
    return sorted(found)


def is_plain(path: Path) -> bool:
    """Whether there is a regular file at `path` itself, not behind a link."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def is_state(path: Path) -> bool:
    """Whether a file is a checkpoint, a state to go on from, or a log of nmfx, by its first bytes."""
    if not is_plain(path):
        return False
    try:
        if path.suffix == ".csv":
            with path.open("rb") as file:
                return file.read(len(LOG_HEAD)) == LOG_HEAD.encode()
        with safe_open(path, "pt") as opened:
            return "nmfx" in (opened.metadata() or {})
    except (OSError, SafetensorError):
        return False


def remove_state(path: Path) -> list[str]:
    """Remove a state, checkpoint or log of nmfx; anything else of that name gets another one, and is returned in a line."""
    if not is_state(path):
        return set_aside(path)
    path.unlink()
    return []


def remove_events(folder: Path) -> None:
    """Remove TensorBoard's files from a folder, and the folder if nothing else is in it."""
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.name.startswith(EVENTS) and is_plain(path):
            path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def set_aside(path: Path) -> list[str]:
    """Give whatever is at `path` a free name beside it; a line that says so, or none if nothing is there."""
    if not os.path.lexists(path):
        return []
    number, kept = 1, path.with_name(f"{path.name}.kept")
    while os.path.lexists(kept):
        number += 1
        kept = path.with_name(f"{path.name}.kept{number}")
    os.rename(path, kept)
    return [f"{path} was not written by nmfx, or was altered since: it is kept as {kept.name}"]
