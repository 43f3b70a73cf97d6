"""nmfx finetune: train a work directory's model under its scheme; the same command goes on with a run that was stopped."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import torch.distributed as dist

from nmfx.cli.common import check_random, data_settings, hint_scores, processes, warn_random
from nmfx.cli.console import advancing, output, warn
from nmfx.errors import NmfxError
from nmfx.passes.transform import scheme_of
from nmfx.passes.verification import verify
from nmfx.processes import rank, world
from nmfx.settings.flags import read_flags, typed
from nmfx.settings.stages import FinetuneSettings
from nmfx.stages.epochs import TUNED
from nmfx.stages.finetune import FILES, FinetuneRecord, Origin, finetune, make_room
from nmfx.stages.stamp import finetune_values
from nmfx.stages.work import TUNING, WorkDirectory, find_work
from nmfx.stages.written import drop_stamp, leave_stamp
from nmfx.training.trainer import LAST


def run(args: Namespace) -> None:
    """Train, write, show."""
    settings, data, out = read_flags(args, FinetuneSettings), data_settings(args), output()
    with processes(args.device) as device:
        work = find_work(args.work, "finetune")
        folder = _folder(args, work, random="weights" in typed(args, FinetuneSettings))
        if work is not None and not args.start:
            fresh = f"{work.model} trains from random weights" if settings.weights == "none" else ""
            check_random(args, work.random or fresh)
            if not fresh:
                warn_random(work)
        if rank() == 0:
            for line in make_room(folder, force=args.force):
                warn(line)
        if world() > 1:
            dist.barrier()  # nobody looks for a run to resume before it is gone
        if (folder / LAST).exists():
            out.print(f"going on with {folder / LAST}; --force starts anew")
        origin = Origin(work, Path(args.start) if args.start else None, args.scheme or "")
        text = f"fine-tuning {work.model if work else args.start} on {data.name}"
        with advancing(text, resumable=True) as progress:
            record = finetune(origin, settings, data, folder, device=device, progress=progress)
        _show(record)
        if work is None or args.out:
            return
        if rank() == 0 and not (args.start or args.scheme):
            names = [f"{TUNING}/{name}" for name in TUNED.values()]
            leave_stamp(work.path, "finetune", finetune_values(settings, data), names, before=("build", "search"))
        elif rank() == 0:
            drop_stamp(work.path, "finetune")
        hint_scores(work, data, None if args.scheme == "dense" else args.scheme)


def _folder(args: Namespace, work: WorkDirectory | None, *, random: bool) -> Path:
    """Where the run goes."""
    if args.start and random:
        raise NmfxError("give --from or --weights, not both")
    if work is None and not args.start:
        raise NmfxError("no work directory here; make one with `nmfx convert MODEL`, then `nmfx search`, or give --from FILE")
    if work is None and not args.out:
        raise NmfxError("--from without a work directory: say where to write, with -o FOLDER")
    folder = Path(args.out) if args.out or work is None else work.path / TUNING
    if args.start and (folder / TUNED["best"]).resolve() == Path(args.start).resolve():
        raise NmfxError(f"{args.start} would be overwritten; give -o another folder")
    return folder


def _show(record: FinetuneRecord) -> None:
    out, result, folder = output(), record.result, record.folder
    for note in record.notes:
        out.print(note, soft_wrap=True)
    which = "before distillation" if record.kept else f"best, epoch {result.best.epoch + 1} of {len(result.epochs)}"
    for label, one, name in ((which, record.best, TUNED["best"]), ("last", result.evaluation, TUNED["last"])):
        scores = f"top-1 {one.top1:.2%}, top-5 {one.top5:.2%}, loss {one.loss:.4f} on {one.samples:,} validation pictures"
        if result.distilled:
            scores = f"agreement with dense {one.top1:.2%}, loss {one.loss:.4f} on {one.samples:,} held-back pictures"
        out.print(f"{label}: {scores} ({name})", soft_wrap=True)
    if len(scheme_of(record.model)):
        out.print(f"verified: {verify(record.model)}", soft_wrap=True)
    out.print(f"verified: {folder / TUNED['best']}, loaded again, evaluates the same to the last digit", soft_wrap=True)
    out.print(f"wrote {', '.join(str(folder / name) for name in FILES)}", soft_wrap=True)
