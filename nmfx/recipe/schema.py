"""What a recipe is: a section of settings for each stage."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from nmfx.errors import NmfxError
from nmfx.models.arguments import parse_kwargs
from nmfx.settings.job import Job
from nmfx.settings.stages import CorrectSettings
from nmfx.sparsity.pattern import Pattern


@dataclass(frozen=True)
class Recipe(Job):
    """A job as a file says it.

    Where there is data and weights that mean something, kept weights are corrected before they train, which after equal epochs
    is worth several points (docs/correction.md); ``correct: false`` leaves that out.
    """

    correct: CorrectSettings | None = CorrectSettings()

    is_whole: ClassVar[bool] = True  # a file, of sections

    def __post_init__(self) -> None:
        kwargs = parse_kwargs(self.model.kwargs, "model", NmfxError)
        object.__setattr__(self, "model", replace(self.model, kwargs=kwargs))
        random = self.model.weights == "none" or (self.finetune is not None and self.finetune.weights == "none")
        idle = self.data is None or random or self.search.pattern == Pattern.DENSE
        if idle and self.correct == CorrectSettings():  # nobody has asked for it
            object.__setattr__(self, "correct", None)
        if self.data is None and (self.correct or self.finetune or self.search.data):
            which = "correct" if self.correct else "finetune" if self.finetune else "search with data: true"
            raise NmfxError(f"{which} needs a data section")
