"""What a stage leaves beside its output, so that `nmfx run` knows whether that is still what the recipe asks for."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nmfx.errors import NmfxError
from nmfx.files.atomic import write_text
from nmfx.files.parsing import Form, Text, read_json
from nmfx.models.source import find_source
from nmfx.settings.option import free_keys, values_of
from nmfx.settings.search import SearchSettings
from nmfx.settings.stages import CorrectSettings, DataSettings, EvaluateSettings, FinetuneSettings, ModelSettings
from nmfx.settings.training import Settings

FOLDER = "stages"


@dataclass(frozen=True)
class Stamp:
    """A stage as it was run.

    Attributes:
        settings: what decides its output, flat: ``{"epochs": 120, ...}``.
        before: the fingerprint of the stage before it.
        outputs: digests of the files it wrote, by path in the folder; None as long as it has not come to an end.
    """

    settings: Mapping[str, Any]
    before: str
    outputs: Mapping[str, str] | None = None

    @property
    def fingerprint(self) -> str:
        """Stands for the settings and the outputs of this stage and of all before it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def starts_as(self, other: Stamp) -> bool:
        """Whether both are of the same work, done or not."""
        return (self.settings, self.before) == (other.settings, other.before)

    def reason(self, wanted: Stamp, folder: Path) -> str:
        """Why the stage has to run for `wanted`; empty when its output is there and still valid."""
        names = dict.fromkeys((*wanted.settings, *self.settings))
        changed = [name for name in names if self.settings.get(name) != wanted.settings.get(name)]
        if changed:
            said = [f"{name} {self.settings.get(name)} -> {wanted.settings.get(name)}"[:120] for name in changed]
            return f"changed: {', '.join(said[:3])}{f' and {len(said) - 3} more' if len(said) > 3 else ''}"
        if self.before != wanted.before:
            return "a stage before it has run again"
        return "it was stopped before its end" if self.outputs is None else self.damage(folder)

    def damage(self, folder: Path) -> str:
        """Which of its outputs is no longer there as it was written; empty when all are."""
        for name, digest in (self.outputs or {}).items():
            if not os.path.isfile(folder / name):  # false for names that no file can have
                return f"{name} is gone"
            if digest_of(folder / name) != digest:
                return f"{name} was altered"
        return ""


def build_values(model: ModelSettings) -> dict[str, Any]:
    """What decides the output of the build stage: its settings, the model's whole name, the content of a weights file."""
    known = model.weights in ("auto", "pretrained", "none")
    file = {} if known else {"content of weights": digest_of(Path(model.weights))}
    return values_of(model) | {"name": str(find_source(model.name))} | file


def search_values(search: SearchSettings, data: DataSettings | None) -> dict[str, Any]:
    """What decides the output of the search stage: its settings, pictures if it looks at any, the content of a scheme file."""
    file = {"content of scheme": digest_of(Path(search.scheme))} if search.scheme else {}
    new = {"vector": search.choices.vector, "platform": search.platform}  # stamps from before there was one stay good
    unsaid = ("data", *(key for key, value in new.items() if value is None))
    return {"look at data": search.data} | values_of(search, unsaid) | (_pictures(data) if search.data else {}) | file


def correct_values(correct: CorrectSettings, data: DataSettings | None) -> dict[str, Any]:
    """What decides the output of the correct stage: its settings and the pictures."""
    return values_of(correct) | _pictures(data)


def finetune_values(finetune: FinetuneSettings, data: DataSettings | None) -> dict[str, Any]:
    """What decides the output of the finetune stage: settings that change the weights, and the pictures."""
    return values_of(finetune, free_keys(Settings)) | _pictures(data)


def evaluate_values(evaluate: EvaluateSettings, data: DataSettings | None) -> dict[str, Any]:
    """What decides the output of the evaluate stage: its settings and the pictures."""
    return values_of(evaluate) | _pictures(data)


def _pictures(data: DataSettings | None) -> dict[str, Any]:
    return data.identity if data else {}


class _Form(Form, frozen=True):
    """A `Stamp` in a file."""

    settings: dict[str, Any]
    before: str
    outputs: dict[Text, Text] | None


def stamp(settings: Mapping[str, Any], before: str) -> Stamp:
    """The stamp of a stage that is about to run; its settings as JSON gives them back."""
    return Stamp(json.loads(json.dumps(dict(settings), default=str)), before)


def read_stamp(folder: Path, stage: str) -> Stamp | None:
    """The stamp a stage left; None when there is none that can be read: the stage then runs."""
    try:
        form = read_json(folder / FOLDER / f"{stage}.json", _Form, "a stamp")
    except NmfxError:
        return None
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in form.outputs or ()):
        return None
    return Stamp(form.settings, form.before, form.outputs)


def write_stamp(folder: Path, stage: str, one: Stamp) -> None:
    """Leave a stamp."""
    content = json.dumps(asdict(one), indent=1)
    write_text(folder / FOLDER / f"{stage}.json", content)


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Digests of files by their path in `folder`."""
    return {name: digest_of(folder / name) for name in names}


def digest_of(path: Path) -> str:
    """32 hexadecimal digits of a file's content; ``absent`` when there is none."""
    try:
        with path.open("rb") as file:
            digest = hashlib.blake2b(digest_size=16)
            while block := file.read(1 << 20):
                digest.update(block)
            return digest.hexdigest()
    except OSError:
        return "absent"
