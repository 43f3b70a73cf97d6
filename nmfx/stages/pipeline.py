"""The stages in their order, in a folder: which have to run, and what is kept of those before.

The folder is a work directory: what ``nmfx evaluate``, ``inspect``, ``export`` and ``compare`` take. Every stage reads what
those before it wrote, and leaves a stamp in ``stages/``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from nmfx.errors import NmfxError
from nmfx.processes import rank, world
from nmfx.progress import Progress, silent
from nmfx.scheme import Totals
from nmfx.settings.job import Job
from nmfx.settings.option import values_of
from nmfx.settings.stages import CorrectSettings, FinetuneSettings
from nmfx.stages.build import build, write_files
from nmfx.stages.correct import correct_weights
from nmfx.stages.epochs import TUNED
from nmfx.stages.evaluate import exported, score, write_scores
from nmfx.stages.export import export
from nmfx.stages.finetune import FILES, Origin, finetune
from nmfx.stages.measured import record_scores
from nmfx.stages.search import search
from nmfx.stages.stamp import (
    Stamp,
    build_values,
    correct_values,
    digests,
    evaluate_values,
    finetune_values,
    read_stamp,
    search_values,
    stamp,
    write_stamp,
)
from nmfx.stages.work import (
    CORRECTED,
    CORRECTING,
    EXPORT,
    HUB,
    SCHEME,
    SCORES,
    SEARCHING,
    START,
    TUNING,
    WEIGHTS,
    WORK,
    open_work,
    save_scheme,
)
from nmfx.stages.written import BOARD, Written, check_folders, is_state, remove_events, remove_state

FOLDERS = ("stages", EXPORT, f"{EXPORT}/{HUB}", TUNING, BOARD, "corrected")
LOOP = f"scheme{SEARCHING}"


@dataclass(frozen=True)
class Done:
    """What a stage did: the files it wrote, by their path in the folder, and what there is to say."""

    outputs: tuple[str, ...]
    lines: tuple[str, ...] = ()


def _build(job: Job, folder: Path, device: str, progress: Progress) -> Done:
    record = build(job.model)
    sites, kept = record.sites, Written(folder).clear(WORK, WEIGHTS, START)
    lines = [
        f"{record.source} ({type(record.model).__name__}, {record.built.weights} weights): {len(sites)} sites, "
        f"{sites.weights:,} weights, {sites.macs:,} MACs",
        f"{len(sites.skipped)} parameters are no sites: {', '.join(s.name for s in sites.skipped)}" if sites.skipped else "",
        f"read through all-ones masks, the largest difference is {record.difference:g}",
        record.built.note,
        *kept,
        f"compressed weights: {describe(record.start.totals(sites))}; no site gets denser" if record.start else "",
    ]
    return Done(tuple(write_files(record, folder)), tuple(line for line in lines if line))


def _search(job: Job, folder: Path, device: str, progress: Progress) -> Done:
    work = open_work(folder)
    record = search(work, job.search, job.data, device=device, checkpoint=folder / LOOP, progress=progress)
    written, lines, result = list[str](), [describe(record.scheme.totals(record.sites))], record.result
    if record.target:
        lines.append(f"target: {record.target}")
    if rank() == 0:
        lines += Written(folder).clear(SCHEME, "scheme.txt")
        written = [path.name for path in save_scheme(record.scheme, folder / SCHEME, record.sites)[0]]
        if is_state(folder / LOOP):
            (folder / LOOP).unlink()
    if result is not None:
        lines.append(f"{result.method}: {len(result.events)} steps in {result.seconds:.2f} s, {result.left:,} left")
        lines += [f"{name}: dense, or with another M ({why})" for name, why in result.dense_reasons.items()]
    return Done(tuple(written), tuple(lines))


def describe(totals: Totals) -> str:
    """What a scheme keeps, in a line."""
    return (
        f"kept: {totals.kept:,} of {totals.weights:,} weights (sparsity {totals.sparsity:.4f}), {totals.kept_macs:,} of "
        f"{totals.macs:,} MACs ({totals.mac_sparsity:.4f})"
    )


def _correct(job: Job, folder: Path, device: str, progress: Progress) -> Done:
    assert job.correct is not None  # or the stage is left out
    assert job.data is not None
    kept = Written(folder).clear(CORRECTED)
    record = correct_weights(open_work(folder), job.correct, job.data, folder / CORRECTED, device=device, progress=progress)
    said = f"{record.changed} of {len(record.weights)} weights corrected on {record.pictures} training pictures, without labels"
    return Done((CORRECTED,), (*kept, said))


def _finetune(job: Job, folder: Path, device: str, progress: Progress) -> Done:
    assert job.finetune is not None  # or the stage is left out
    assert job.data is not None

    def make_way(names: Iterable[str]) -> list[str]:
        return Written(folder).clear(*(f"{TUNING}/{name}" for name in names))

    start = folder / CORRECTED if job.correct is not None else None
    origin, place = Origin(open_work(folder), start), folder / TUNING
    record = finetune(origin, job.finetune, job.data, place, device=device, make_way=make_way, progress=progress)
    best, epochs = record.result.best, len(record.result.epochs)
    said = f"{epochs} epochs; best top-1 {best.top1:.2%} after epoch {best.epoch + 1}"
    if record.result.distilled:
        said = f"{epochs} epochs; {record.best.top1:.2%} of answers as the dense network's on held-back pictures"
    return Done(tuple(f"{TUNING}/{name}" for name in TUNED.values()), (said, *record.notes))


def _export(job: Job, folder: Path, device: str, progress: Progress) -> Done:
    def make_way(names: list[str]) -> list[str]:
        paths, left = [f"{EXPORT}/{name}" for name in names], Written(folder)
        earlier = [f"{EXPORT}/{file.relative_to(folder / EXPORT)}" for file in (folder / EXPORT).rglob("*")]
        stale = [path for path in earlier if path not in paths and left.ours(path)]  # of a run with other settings
        return left.clear(*paths, *stale)

    finished = [name for name, asked in (("finetune", job.finetune), ("correct", job.correct)) if asked is not None]
    place = folder / EXPORT
    record = export(open_work(folder), job.export, place, finished=finished, make_way=make_way, progress=progress)
    paths = tuple(f"{EXPORT}/{name}" for name in record.files.values())
    lines, checked = list[str](), record.verified
    if checked is not None:
        lines.append(str(checked))
    lines += [str(record.runs)] if record.runs is not None else []
    lines += [*record.notes, *(f"wrote {folder / path} ({(folder / path).stat().st_size:,} bytes)" for path in paths)]
    return Done(paths, tuple(lines))


def _evaluate(job: Job, folder: Path, device: str, progress: Progress) -> Done:
    assert job.data is not None  # or the stage is left out
    record = score(exported(open_work(folder)), job.evaluate, job.data, device=device, progress=progress)
    kept: list[str] = []
    if rank() == 0:
        kept = Written(folder).clear(SCORES)
        write_scores(record, folder)
        record_scores(folder, record.scores, record.files, job.data.name)
    return Done((SCORES,), tuple(kept))


@dataclass(frozen=True)
class Stage:
    """What decides a stage's output, what runs it, and the files of a run that was stopped."""

    settings: Callable[[Job], dict[str, Any]]
    run: Callable[[Job, Path, str, Progress], Done]
    drafts: tuple[str, ...] = ()
    together: bool = False  # every process takes part, not only the first


STAGES = {
    "build": Stage(lambda job: build_values(job.model), _build),
    "search": Stage(lambda job: search_values(job.search, job.data), _search, (LOOP,), together=True),
    "correct": Stage(lambda job: correct_values(job.correct or CorrectSettings(), job.data), _correct, (CORRECTING,)),
    "finetune": Stage(
        lambda job: finetune_values(job.finetune or FinetuneSettings(), job.data),
        _finetune,
        tuple(f"{TUNING}/{name}" for name in FILES),
        together=True,
    ),
    "export": Stage(lambda job: values_of(job.export), _export),
    "evaluate": Stage(lambda job: evaluate_values(job.evaluate, job.data), _evaluate, together=True),
}


class Pipeline:
    """The stages of a job in a folder; ask `reason` why one has to run, and `run` it, in the order of `stages`."""

    def __init__(self, job: Job, folder: Path, *, device: str = "cpu") -> None:
        """Raises NmfxError when the folder is not one of ours, or leads elsewhere by a link inside it."""
        self.job, self.folder, self.device = job, folder, device
        check_folders(folder, FOLDERS)
        here = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
        if here and not ((folder / "stages").is_dir() or (folder / WORK).is_file()):
            raise NmfxError(f"{folder} exists, and is no work directory of nmfx; give -o another folder")

    @property
    def stages(self) -> list[str]:
        """The stages that the job has."""
        job = self.job
        absent = {"correct": job.correct is None, "finetune": job.finetune is None, "evaluate": job.data is None}
        return [name for name in STAGES if not absent.get(name)]

    def _wanted(self, stage: str) -> Stamp:
        before = self.stages[: self.stages.index(stage)]
        last = read_stamp(self.folder, before[-1]) if before else None
        return stamp(STAGES[stage].settings(self.job), last.fingerprint if last else "")

    def reason(self, stage: str) -> str:
        """Why a stage has to run, once those before it have; empty when its output is there and still valid."""
        there, wanted = read_stamp(self.folder, stage), self._wanted(stage)
        said = "there is no output yet" if there is None else there.reason(wanted, self.folder)
        _together()  # nobody writes before all have looked
        return said

    def run(self, stage: str, progress: Progress = silent, *, anew: bool = False) -> tuple[str, ...]:
        """Run a stage; what it has to say. One that was stopped goes on, unless it is another one now, or `anew`."""
        folder, one, wanted = self.folder, STAGES[stage], self._wanted(stage)
        there, kept = read_stamp(folder, stage), list[str]()
        _together()
        if rank() == 0:
            if anew or there is None or not there.starts_as(wanted):
                kept = [line for name in one.drafts for line in remove_state(folder / name)]
                remove_events(folder / BOARD) if stage == "finetune" else None
            write_stamp(folder, stage, wanted)
        _together()
        done = one.run(self.job, folder, self.device, progress) if one.together or rank() == 0 else Done(())
        if rank() == 0:
            outputs = digests(folder, done.outputs)
            Written(folder).record(outputs)
            write_stamp(folder, stage, replace(wanted, outputs=outputs))
        _together()
        return (*kept, *done.lines)


def _together() -> None:
    """Wait for the other processes."""
    if world() > 1:
        dist.barrier()
