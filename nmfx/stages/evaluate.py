"""The evaluate stage: top-1, top-5 and loss of models on the validation pictures, beside each other."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from torch import nn

from nmfx.data.loader import validation_loader
from nmfx.data.source import Data
from nmfx.errors import CheckpointError, NmfxError
from nmfx.export.checkpoint import load_checkpoint
from nmfx.export.hub import is_hub
from nmfx.export.start import is_compressed
from nmfx.files.atomic import write_text
from nmfx.files.parsing import read_json
from nmfx.passes.transform import scheme_of, transform
from nmfx.processes import world
from nmfx.progress import Progress, silent
from nmfx.scheme import Scheme
from nmfx.settings.stages import DataSettings, EvaluateSettings, ModelSettings
from nmfx.stages.build import build_weights
from nmfx.stages.data import fit_pictures, open_pictures
from nmfx.stages.work import SCORES, WEIGHTS, WorkDirectory, around, open_work, random_weights
from nmfx.text import sentence
from nmfx.training.evaluation import Evaluation, evaluate

FIRST = ("dense", "start")  # labels of the model that the others are compared with


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate, what to call it, and its input size where that is not its own.

    Attributes:
        note: what is to be said of its weights.
        random: what is to be said of random weights; empty where they are none.
        files: that its weights are, and the scheme that masks them; none where they are not of a work directory.
    """

    label: str
    model: nn.Module
    size: tuple[int, ...] | None = None
    note: str = ""
    random: str = ""
    files: tuple[Path, ...] = ()


@dataclass(frozen=True)
class EvaluateRecord:
    """Scores by label, the data they are on, and the files of the weights that are of a work directory."""

    scores: dict[str, Evaluation]
    data: Data
    files: dict[str, tuple[Path, ...]] = field(default_factory=dict)


def score(
    candidates: Iterable[Candidate],
    settings: EvaluateSettings,
    pictures: DataSettings,
    *,
    reference: nn.Module | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> EvaluateRecord:
    """Evaluate models one after another; every process calls it.

    Args:
        candidates: the models, each loaded when its turn comes.
        settings: pictures a batch.
        pictures: whose validation part is looked at.
        reference: a model whose answers those of the others are compared with; by default the first if it is a dense one.
        device: where the models run.
        progress: told which model is at work.

    Returns:
        Top-1, top-5 and loss of each model, by its label.

    Raises:
        NmfxError: pictures that a model cannot take.
    """
    data, scores, files = open_pictures(pictures), dict[str, Evaluation](), dict[str, tuple[Path, ...]]()
    size = max(1, settings.batch_size // world())
    reference = reference.to(device) if reference is not None else None
    for one in candidates:
        config = fit_pictures(data, one.model, one.size)
        progress(0.0, f"evaluating {one.label} on {data.name}")
        batches = validation_loader(data, config, batch_size=size, workers=pictures.workers)
        try:
            scores[one.label] = evaluate(one.model.to(device), batches, reference=reference)
        except RuntimeError as error:
            shape = "x".join(map(str, config.input_size))
            raise NmfxError(
                f"{one.label}: the forward pass fails on pictures of {shape}: {sentence(error)}; give --input-size as the "
                f"model expects it"
            ) from error
        files |= {one.label: one.files} if one.files else {}
        if reference is None and one.label in FIRST:
            reference = one.model
    return EvaluateRecord(scores, data, files)


def load_candidate(what: str, settings: ModelSettings, network: str | None = None) -> Candidate:
    """A compressed checkpoint, plain weights of `network`, a work directory's dense model, or a model by name.

    Raises:
        NmfxError: plain weights, and nobody says of which network; a file or model that cannot be had.
    """
    path = Path(what)
    if is_hub(path):
        return Candidate(what, load_checkpoint(path), settings.size)
    if path.is_dir():
        work = open_work(path)
        return Candidate(what, work.load(), settings.size or work.input_size, random=work.random)
    if not path.is_file():
        built = build_weights(replace(settings, name=what))
        return Candidate(what, built.model, settings.size, random=random_weights(what, built.weights, built.note))
    inside = around(path)
    size = settings.size or (inside.input_size if inside else None)
    if is_compressed(path):
        return Candidate(what, load_checkpoint(path), size)
    if network is None:
        raise NmfxError(f"{what}: plain weights; give --model NAME, the network they are for")
    built = build_weights(replace(settings, name=network, weights=what))
    return Candidate(what, built.model, size, note="" if built.note == f"weights from {what}" else built.note)


def candidates_of(what: str, settings: ModelSettings, network: str | None = None) -> Iterator[Candidate]:
    """What is named: one model, or of a work directory the dense (or sparse start), masked and finished ones."""
    if not Path(what).is_dir() or is_hub(what):
        yield load_candidate(what, settings, network)
        return
    work = open_work(Path(what))
    size, dense, scheme = settings.size or work.input_size, work.load(), None
    first = "start" if work.start_path.is_file() else "dense"
    yield Candidate(first, dense, size, random=work.random, files=(work.path / WEIGHTS,))
    if work.scheme_path.is_file():
        sites = work.sites(dense)
        scheme = Scheme.load(work.scheme_path, sites)
        masked = transform(dense, scheme, sites=sites)
        yield Candidate("masked, untrained", masked, size, files=(work.path / WEIGHTS, work.scheme_path))
    finished = {"recalibrated": work.recalibrated_path, "corrected": work.corrected_path, "fine-tuned": work.tuned_path}
    for label, file in finished.items():
        if file.is_file():
            model = load_checkpoint(file)
            other = scheme is not None and scheme_of(model).patterns != scheme.patterns
            yield Candidate(f"{label}{', another scheme' if other else ''}", model, size, files=(file,))


def exported(work: WorkDirectory) -> Iterator[Candidate]:
    """The model that a recipe started from, if its weights are any, and the one that it exported."""
    if not work.random:
        first = "start" if work.start_path.is_file() else "dense"
        yield Candidate(first, work.load(), work.input_size, files=(work.path / WEIGHTS,))
    model = load_checkpoint(work.exported_path, work.load())
    yield Candidate("exported", model, work.input_size, files=(work.exported_path,))


def write_scores(record: EvaluateRecord, folder: Path) -> None:
    """Write scores into a work directory."""
    write_text(folder / SCORES, json.dumps({name: asdict(one) for name, one in record.scores.items()}, indent=1))


def read_scores(folder: Path) -> dict[str, Evaluation]:
    """The scores that a work directory holds, by label.

    Raises:
        CheckpointError: there are none.
    """
    try:
        return read_json(folder / SCORES, dict[str, Evaluation], "scores")
    except NmfxError as error:
        raise CheckpointError(f"{folder / SCORES}: no scores there ({error}); run the recipe to its end") from error
