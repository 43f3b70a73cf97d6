"""All that a whole run can be told."""

from __future__ import annotations

from dataclasses import dataclass

from nmfx.settings.search import SearchSettings
from nmfx.settings.stages import (
    CorrectSettings,
    DataSettings,
    EvaluateSettings,
    ExportSettings,
    FinetuneSettings,
    ModelSettings,
)


@dataclass(frozen=True)
class Job:
    """The settings of a whole run. Without `correct` kept weights keep their values; without `finetune` nothing is trained;
    without `data` nothing is evaluated.
    """

    model: ModelSettings
    search: SearchSettings
    data: DataSettings | None = None
    correct: CorrectSettings | None = None
    finetune: FinetuneSettings | None = None
    export: ExportSettings = ExportSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
