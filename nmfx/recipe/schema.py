"""What a recipe is: a section of settings for each stage."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from nmfx.errors import NmfxError
from nmfx.models.arguments import parse_kwargs
from nmfx.settings.job import Job


@dataclass(frozen=True)
class Recipe(Job):
    """A job as a file says it."""

    is_whole: ClassVar[bool] = True  # a file, of sections

    def __post_init__(self) -> None:
        kwargs = parse_kwargs(self.model.kwargs, "model", NmfxError)
        object.__setattr__(self, "model", replace(self.model, kwargs=kwargs))
        if self.data is None and (self.correct or self.finetune or self.search.data):
            which = "correct" if self.correct else "finetune" if self.finetune else "search with data: true"
            raise NmfxError(f"{which} needs a data section")
