"""nmfx compress: from a network by name and a folder of pictures to an accurate sparse checkpoint, in one command."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from nmfx.cli.common import data_settings, processes
from nmfx.cli.console import hint, output
from nmfx.cli.run import run_job
from nmfx.data.config import check_classes
from nmfx.data.sample import few_pictures
from nmfx.errors import DataError
from nmfx.models.source import find_source
from nmfx.settings.flags import read_flags
from nmfx.settings.job import compression
from nmfx.settings.stages import CompressSettings, DataSettings, ModelSettings
from nmfx.stages.data import open_pictures
from nmfx.stages.work import directory_for, open_work


def run(args: Namespace) -> None:
    """Look at the pictures, make the job, run its stages."""
    model, data = read_flags(args, ModelSettings, name=args.model), data_settings(args)
    settings = read_flags(args, CompressSettings)
    few_pictures(open_pictures(data, labels=False), settings.pictures, hold_back=True)  # raises before anything is written
    missing = _without_labels(model, data)
    if missing:
        output().print(f"no evaluation, as there are no labels to do it by: {missing}", soft_wrap=True)
    args.until, args.strict_weights = "export" if missing else None, True
    folder = Path(args.out) if args.out else directory_for(args.model)
    with processes(args.device) as device:
        run_job(args, compression(model, data, settings), folder, device)
    work = open_work(folder)
    hint(
        (work.command("bench"), "its speed here, beside dense engines"),
        (work.command("inspect"), "what is where"),
    )


def _without_labels(model: ModelSettings, data: DataSettings) -> str:
    """Why what comes out cannot be evaluated; empty where it can."""
    try:
        source = replace(find_source(model.name), kwargs=dict(model.kwargs))
        check_classes(open_pictures(data), source.build_meta())
    except DataError as error:
        return str(error).partition("; build the model")[0]
    return ""
