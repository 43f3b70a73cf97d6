"""measured.json of a work directory: accuracies, each with a digest of the weights that they are of.

So a figure is never said of other weights than it was measured of, whatever was trained or exported since.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from nmfx.errors import NmfxError
from nmfx.export.card import Figure
from nmfx.files.atomic import write_text
from nmfx.files.parsing import Count, Form, Share, Text, read_json
from nmfx.stages.stamp import digest_of
from nmfx.training.evaluation import Evaluation

MEASURED = "measured.json"


class _Score(Form, frozen=True):
    weights: Text
    label: Text
    data: Text
    top1: Share
    top5: Share
    samples: Count


def record_scores(folder: Path, scores: Mapping[str, Evaluation], files: Mapping[str, Sequence[Path]], data: str) -> None:
    """Add scores to those of a work directory; newer ones of the same weights on the same data replace older ones.

    Args:
        scores, files: by label; scores without files are not recorded. Weights that are masked by a scheme are two files.
        data: the pictures, in a few words.
    """
    found = {(one.weights, one.data): one for one in _read(folder)}
    for label, score in scores.items():
        if label in files and all(file.is_file() for file in files[label]):
            weights = _digest(files[label])
            found[weights, data] = _Score(weights, label, data, score.top1, score.top5, score.samples)
    if found:
        content = [{name: getattr(one, name) for name in _Score.__struct_fields__} for one in found.values()]
        write_text(folder / MEASURED, json.dumps(content, indent=1))


def figures_of(folder: Path, files: Mapping[str, Sequence[Path]]) -> list[Figure]:
    """What was recorded of these files as they are now, by what they are called here."""
    recorded, found = _read(folder), list[Figure]()
    for what, those in files.items():
        digest = _digest(those)
        found += [Figure(what, one.top1, one.top5, one.samples, one.data) for one in recorded if one.weights == digest]
    return list(dict.fromkeys(found))


def _digest(files: Sequence[Path]) -> str:
    return "+".join(map(digest_of, files))


def _read(folder: Path) -> list[_Score]:
    try:
        return read_json(folder / MEASURED, list[_Score], "measured accuracies")
    except NmfxError:  # none yet, or damaged: then nothing was measured
        return []
