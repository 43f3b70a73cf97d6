"""What several commands do alike: what they are asked for, random weights, and what to do next."""

from __future__ import annotations

import contextlib
import os
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace

from nmfx.cli.console import advancing, errors, hint, output, warn
from nmfx.errors import NmfxError
from nmfx.processes import joined, rank
from nmfx.runtime.kernel.library import load_kernel
from nmfx.settings.flags import read_flags
from nmfx.settings.stages import FOLDER, DataSettings
from nmfx.stages.work import WorkDirectory, need_work


def data_settings(args: Namespace) -> DataSettings:
    """The pictures of --data; a folder of the name that recipes have for folders is that folder."""
    data = read_flags(args, DataSettings)
    return replace(data, root=FOLDER) if data.name == FOLDER and not data.root else data


@contextlib.contextmanager
def processes(device: str = "auto") -> Iterator[str]:
    """Join torchrun's processes, of which the first one prints, and yield the device of this one."""
    with joined(device) as chosen:
        if rank():
            output().quiet = errors().quiet = True
        yield chosen


def check_random(args: Namespace, said: str) -> None:
    """Raise where random weights, of which there is something `said`, are an error."""
    why = "--strict-weights forbids them; give --weights FILE to nmfx convert"
    if args.command == "compress":
        why = "what comes out would be of no use: give trained ones, by --weights FILE"
    if said and (args.strict_weights or os.environ.get("NMFX_STRICT_WEIGHTS", "0") not in ("", "0")):
        raise NmfxError(f"{said}, and {why}")


def work_of(args: Namespace) -> WorkDirectory:
    """The work directory that a command needs; raises for random weights where they are an error, else says so once, first."""
    work = need_work(args.work, args.command)
    check_random(args, work.random)
    warn_random(work)
    return work


def warn_random(work: WorkDirectory) -> None:
    """What every command says before anything else of a network that has random weights."""
    if work.random:
        warn(f"{work.random}: anything found reflects shapes only", "WARNING")


def hint_scheme(
    work: WorkDirectory, data: DataSettings | None = None, scheme: str | None = None, platform: str | None = None
) -> None:
    """What can be done with a scheme: what brings accuracy back comes before the export."""
    there = ("--for", platform) if platform else ()
    pictures = data.flags if data else ("--data", "digits" if work.model == "demo:digits" else "DIR")
    hint(
        (work.command("finetune", *pictures, scheme=scheme), "train it under this scheme"),
        (work.command("correct", *pictures, scheme=scheme), "new values for kept weights, no training"),
        (work.command("export", *there, scheme=scheme), "as it is"),
    )


def hint_scores(work: WorkDirectory, data: DataSettings, scheme: str | None, *, distil: bool = False) -> None:
    """What can be done with a network that a stage has finished; `distil` if that is a step from there."""
    further = [(work.command("finetune", *data.flags, "--distill-only"), "nearer to dense: ten minutes, no labels")]
    export = work.command("export", scheme=scheme)
    hint((work.command("evaluate", *data.flags), "what it scores"), *(further if distil else []), (export, "write it out"))


def check_kernel() -> None:
    """Build or load the sparse kernel; one line if it cannot be had, with what to do."""
    with advancing("loading the sparse kernel; the first time it is built, which takes a minute"):
        reason = load_kernel()
    if reason:
        warn(f"no sparse kernel, so nothing gets faster than dense: {reason}")
