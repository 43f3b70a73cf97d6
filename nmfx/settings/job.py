"""All that a whole run can be told."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nmfx.settings.search import SearchSettings
from nmfx.settings.stages import (
    DISTILLATION,
    CompressSettings,
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


def compression(model: ModelSettings, data: DataSettings, settings: CompressSettings) -> Job:
    """The job of `nmfx compress`: a scheme, kept weights corrected, then distilled, without a label."""
    finetune = replace(DISTILLATION, minutes=settings.minutes, pictures=settings.pictures) if settings.minutes else None
    correct = CorrectSettings(pictures=settings.pictures)
    return Job(model, SearchSettings(target=settings.target), data, correct, finetune)
