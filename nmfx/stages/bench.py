"""The bench stage: a network, dense and converted, on every engine of this machine."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from nmfx.errors import NmfxError
from nmfx.export.checkpoint import load_checkpoint
from nmfx.export.hub import is_hub
from nmfx.export.onnx import save_onnx
from nmfx.export.start import is_compressed
from nmfx.models.census import find_sites
from nmfx.models.example import Example
from nmfx.passes.baking import bake
from nmfx.passes.transform import transform
from nmfx.progress import Progress, silent
from nmfx.runtime.measuring.bench import Bench, bench
from nmfx.runtime.measuring.latency import noise
from nmfx.scheme import Scheme
from nmfx.search.finder import find_scheme
from nmfx.settings.stages import BenchSettings, DataSettings, ModelSettings, PrecisionSettings
from nmfx.stages.data import calibration_for
from nmfx.stages.evaluate import load_candidate
from nmfx.stages.work import example_of, open_work, pictures_of


@dataclass(frozen=True)
class Pair:
    """A network to time: dense, converted, a batch of one picture for both, and what to call it.

    Attributes:
        notes: what was left out.
        random: what is to be said of random weights; empty where they are none.
    """

    dense: nn.Module = field(repr=False)
    converted: nn.Module = field(repr=False)
    pictures: Tensor = field(repr=False)
    label: str
    notes: tuple[str, ...] = ()
    random: str = ""


def load_pair(what: str, model: ModelSettings, settings: BenchSettings, scheme: str | None = None) -> Pair:
    """A work directory's network, that of a compressed checkpoint or of a folder for a model hub, or a model by name under a
    scheme that is searched.

    Raises:
        NmfxError: plain weights, no scheme, a model that cannot be had or takes more than pictures.
    """
    path = Path(what)
    shared = is_hub(path)
    if path.is_dir() and not shared:
        work = open_work(path)
        dense = work.load()
        sites, pictures = work.sites(dense), pictures_of(example_of(dense, model.size or work.input_size))
        chosen = work.scheme(sites, scheme)
        finished, notes = work.finished(chosen)
        label = str(path if finished is None else finished.path)
        converted = transform(dense, chosen, sites=sites) if finished is None else load_checkpoint(finished.path)
        return Pair(dense, converted, pictures, label, tuple(notes), work.random)
    if path.is_file() and not is_compressed(path):
        raise NmfxError(f"{path}: plain weights; bench takes a compressed checkpoint, a work directory or a model's name")
    one = load_candidate(what, model)
    dense, example = one.model, example_of(one.model, one.size)
    if path.is_file() or shared:
        return Pair(bake(dense), dense, pictures_of(example), str(path))
    sites = find_sites(dense, example)
    if scheme:
        chosen = Scheme.load(scheme, sites)
    else:
        chosen = find_scheme(dense, sites=sites, target=settings.target, m=settings.m).scheme
    return Pair(dense, transform(dense, chosen, sites=sites), pictures_of(example), what, random=one.random)


def time_pair(
    pair: Pair,
    settings: BenchSettings,
    precision: PrecisionSettings,
    pictures: DataSettings | None = None,
    progress: Progress = silent,
) -> tuple[Bench, list[str]]:
    """Time it on PyTorch, torch.compile, other engines and nmfx; what was measured, and notes on what was left out.

    Args:
        precision: of nmfx.
        pictures: that int8 is calibrated on; None: noise, as times do not hang on it.
    """
    with tempfile.TemporaryDirectory() as folder:
        path, onnx, notes = Path(folder) / "dense.onnx", None, list[str]()
        calibration = None
        if precision.precision == "int8" and pictures is None:
            (calibration,) = noise(pair.pictures[:1].expand(8, *pair.pictures.shape[1:]))
            notes.append("int8 calibrated on noise: times are right, its outputs are not; --data says which pictures to take")
        elif precision.precision == "int8":
            calibration = calibration_for(precision, pictures, pair.dense, tuple(pair.pictures.shape[1:]))
        progress(0.0, "exporting the dense model to ONNX")
        try:
            save_onnx(bake(pair.dense), path, Example((pair.pictures,)))
            onnx = path
        except NmfxError as error:
            notes.append(f"PyTorch alone in the table: {error}")
        found = bench(
            pair.dense, pair.converted, pair.pictures, batches=settings.batches, threads=settings.thread_counts,
            turns=settings.turns, onnx=onnx, engines=settings.engine_names, tune=settings.tune,
            calibration=calibration, progress=progress,
        )  # fmt: skip
    return found, notes
