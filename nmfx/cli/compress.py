"""nmfx compress: from a network by name and a folder of pictures to an accurate sparse checkpoint, in one command."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from nmfx.cli.common import data_settings, processes
from nmfx.cli.console import hint
from nmfx.cli.run import run_job
from nmfx.data.folder import has_classes
from nmfx.settings.flags import read_flags
from nmfx.settings.job import Job, compression
from nmfx.settings.stages import CompressSettings, DataSettings, ModelSettings
from nmfx.stages.work import directory_for, open_work


def run(args: Namespace) -> None:
    """Make the job, run its stages."""
    model, data = read_flags(args, ModelSettings, name=args.model), data_settings(args)
    args.until = None if _labelled(data) else "export"
    args.strict_weights = True
    job: Job = compression(model, data, read_flags(args, CompressSettings))
    folder = Path(args.out) if args.out else directory_for(args.model)
    with processes(args.device) as device:
        run_job(args, job, folder, device)
    work = open_work(folder)
    hint(
        (work.command("bench"), "its speed here, beside dense engines"),
        (work.command("inspect"), "what is where"),
    )


def _labelled(data: DataSettings) -> bool:
    """Whether there are labels to evaluate with."""
    return not (folder := Path(data.root or data.name)).is_dir() or has_classes(folder, data.train_split, data.val_split)
