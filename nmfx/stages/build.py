"""The build stage: a model by name with its weights, its sites, and the proof that masks change nothing by themselves."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from nmfx.errors import NmfxError, SearchError
from nmfx.export.hub import NAMES
from nmfx.export.plain import save_baked
from nmfx.export.start import build_start, detach_scheme, is_compressed
from nmfx.files.atomic import replace_folder, write_text
from nmfx.models.arguments import parse_kwargs
from nmfx.models.building import Built, build_model
from nmfx.models.census import find_sites
from nmfx.models.example import Example
from nmfx.models.site import Sites
from nmfx.models.source import SOURCE, Source, find_source
from nmfx.passes.transform import conversion_difference
from nmfx.scheme import Scheme
from nmfx.search.problem import make_problem
from nmfx.settings.formats import FORMATS
from nmfx.settings.search import SearchSettings
from nmfx.settings.stages import ModelSettings
from nmfx.stages.finetune import FILES
from nmfx.stages.measured import MEASURED
from nmfx.stages.stamp import build_values, search_values
from nmfx.stages.work import (
    CORRECTED,
    CORRECTING,
    EXPORT,
    HUB,
    RECALIBRATED,
    SCHEME,
    SCORES,
    SEARCHING,
    START,
    TUNING,
    WEIGHTS,
    WORK,
    WorkDirectory,
    example_of,
    open_work,
    save_scheme,
)
from nmfx.stages.written import leave_stamp, strangers
from nmfx.text import nearest

KNOWN = ("auto", "pretrained", "none")  # words for weights; anything else is a file
EXPORTS = (".safetensors", *(one.ending for one in FORMATS.values()), ".onnx.data")
OURS = {
    *(WORK, WEIGHTS, START, SCHEME, "scheme.txt", f"scheme{SEARCHING}", CORRECTED, CORRECTING, RECALIBRATED, SCORES, MEASURED),
    *(f"{TUNING}/{name}" for name in FILES),
    *(f"{EXPORT}/{SCHEME}", f"{EXPORT}/scheme.txt", *(f"{EXPORT}/{HUB}/{name}" for name in NAMES)),
    *(f"stages/{name}.json" for name in ("build", "search", "correct", "finetune", "export", "evaluate", "written")),
}  # what may lie in a work directory


@dataclass(frozen=True)
class BuildRecord:
    """What the build stage found.

    Attributes:
        start: the scheme that the weights are under already, if they came from a compressed checkpoint.
        difference: the largest one between outputs of the model and of itself read through all-ones masks; 0 is exact.
    """

    built: Built
    source: Source
    example: Example = field(repr=False)
    sites: Sites = field(repr=False)
    start: Scheme | None
    difference: float
    input_size: tuple[int, ...] | None

    @property
    def model(self) -> nn.Module:
        """The dense model."""
        return self.built.model

    def work(self, path: Path) -> WorkDirectory:
        """The work directory that is or will be at `path`."""
        return WorkDirectory(
            path, str(self.source), self.built.weights, self.built.note, self.input_size, dict(self.source.kwargs)
        )


def build(settings: ModelSettings) -> BuildRecord:
    """Build the model that settings name and look at it.

    Raises:
        ModelError: an unknown name, arguments its builder does not take, weights that cannot be had or do not fit.
        TraceError: its forward pass fails on the example input.
    """
    return examine(build_weights(settings), settings.size)


def build_weights(settings: ModelSettings) -> Built:
    """The model that settings name, with its weights: dense, or converted where they are a compressed checkpoint."""
    if is_compressed(settings.weights):
        return build_start(Path(settings.weights), replace(find_source(settings.name), kwargs=dict(settings.kwargs)))
    entry = settings.weights_entry or None
    return build_model(settings.name, weights=settings.weights, kwargs=settings.kwargs, entry=entry)


def check_weights(settings: ModelSettings) -> None:
    """Refuse weights that cannot be meant, before anything is built."""
    weights, path, known = settings.weights, Path(settings.weights), settings.weights in KNOWN
    expected = "expected auto, pretrained, none or a file"
    if path.is_dir():
        raise NmfxError(f"--weights {weights}: a folder; {expected}")
    if not known and not path.exists() and not path.suffix:
        raise NmfxError(f"--weights {weights}: no such file{nearest(weights, KNOWN)}; {expected}")
    if known and settings.weights_entry:
        raise NmfxError(f"--weights-entry {settings.weights_entry} is of a file: give --weights FILE")


def examine(built: Built, input_size: tuple[int, ...] | None) -> BuildRecord:
    """The sites of a model that was built, the scheme it came with (which is baked into it), and the check of conversion."""
    model, source = built.model, getattr(built.model, SOURCE, built.source)
    example = example_of(model, input_size)
    sites = find_sites(model, example)
    start = detach_scheme(model, sites)
    return BuildRecord(built, source, example, sites, start, conversion_difference(model, sites, example), input_size)


def write_files(record: BuildRecord, folder: Path) -> list[str]:
    """Write the files of a work directory into a folder, work.yaml last; their names."""
    parse_kwargs(record.source.kwargs, f"{folder}: {record.source}", NmfxError)  # or it could not be read again
    written = []
    if record.built.weights != "random":  # their seed gives those again
        save_baked(record.model, folder / WEIGHTS)
        written.append(WEIGHTS)
    if record.start is not None:
        record.start.save(folder / START, record.sites)
        written.append(START)
    write_text(folder / WORK, record.work(folder).to_yaml())
    return [*written, WORK]


def create(
    record: BuildRecord,
    path: Path,
    scheme: Scheme | None = None,
    *,
    force: bool,
    made_by: tuple[ModelSettings, SearchSettings | None] | None = None,
) -> WorkDirectory:
    """Write a work directory whole: into a temporary one beside it, then renamed.

    Args:
        record: the model, its sites and weights.
        path: where the directory goes.
        scheme: a scheme to write into it.
        force: replace a work directory that is there.
        made_by: the settings behind the model and the scheme, for the stamps that `nmfx run` reads; without them it has none.

    Returns:
        The work directory.

    Raises:
        NmfxError: it exists and `force` is false, or is no work directory of ours.
    """

    def fill(folder: Path) -> None:
        names = write_files(record, folder)
        if made_by is not None:
            leave_stamp(folder, "build", build_values(made_by[0]), names)
        if scheme is not None:
            written = [file.name for file in save_scheme(scheme, folder / SCHEME, record.sites)[0]]
            if made_by is not None and made_by[1] is not None:
                leave_stamp(folder, "search", search_values(made_by[1], None), written, before=("build",))

    check_absent(path, force=force)
    replace_folder(path, fill)
    return record.work(path)


def sparser_search(work: WorkDirectory) -> tuple[str, str]:
    """A search that a sparse start can answer, as a command that can be typed, and what it does."""
    sites = work.sites(work.build_meta())
    start = work.start(sites)
    assert start is not None  # it has been written
    kept, m = 1 - start.totals(sites).sparsity, max(pattern.m for pattern in start.values())
    flags = ["--layout", "flat"] if start.layout == "flat" else []
    flags += ["--remainder", "short"] if start.short else []
    policy: dict[str, Any] = {"layout": start.layout, "remainder": "short" if start.short else "dense"}
    for share in (0.5, 0.75, 0.9):
        target = f"{1 - share * kept:.4f}"
        with contextlib.suppress(SearchError):
            make_problem(sites, target=target, m=m, mixed=True, within=start, **policy)
            return work.command("search", "--target", target, *flags), "sparser than it is"
    return work.command("search", "--m", "32", "--target", f"{1 - 0.9 * kept:.4f}"), "sparser than it is, if it can be"


def check_absent(path: Path, *, force: bool) -> None:
    """Raise unless `path` can be written as a work directory."""
    if path.exists() and not (path / WORK).is_file():
        raise NmfxError(f"{path} exists and is no work directory of nmfx; choose another name with --out")
    if path.exists() and not force:
        raise NmfxError(f"{path} exists already; give --force to replace it, or --out for another name")
    if path.exists():
        _check_replaceable(path)


def _check_replaceable(path: Path) -> None:
    """Raise if a work directory that is to be replaced holds a user's own files; the names that nmfx gives are --force's."""
    try:
        name = open_work(path).model.partition(":")[2]
    except NmfxError:  # damaged: --force is for that, too
        name = path.name.removesuffix(".nmfx")
    others = strangers(path, {*OURS, *(f"{EXPORT}/{name}{ending}" for ending in EXPORTS)})
    if others:
        shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        raise NmfxError(f"{path} would be replaced, but nmfx did not write {shown} in it: move what you need, or give --out")
