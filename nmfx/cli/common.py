"""What several commands do alike: pictures and weights as they are asked for, and what to do next."""

from __future__ import annotations

import contextlib
import os
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from nmfx.cli.console import advancing, silence, warn, working
from nmfx.errors import NmfxError
from nmfx.processes import asked_to_stop, joined, rank
from nmfx.progress import Progress
from nmfx.runtime.kernel.building import load_kernel
from nmfx.settings.flags import read_flags
from nmfx.settings.stages import FOLDER, DataSettings, ModelSettings
from nmfx.stages.work import WorkDirectory

DIGITS = "digits"  # the pictures that the demo network was trained on


def model_settings(args: Namespace, name: str = "", **given: Any) -> ModelSettings:
    """The network that arguments name, with its weights, classes and input size."""
    classes = getattr(args, "classes", None)
    kwargs = {"num_classes": classes} if classes else {}
    return read_flags(args, ModelSettings, name=name, kwargs=kwargs, **given)


def data_settings(args: Namespace) -> DataSettings:
    """The pictures of --data; a folder of the name that recipes have for folders is that folder."""
    data = read_flags(args, DataSettings)
    return replace(data, root=FOLDER) if data.name == FOLDER and not data.root else data


def data_options(data: DataSettings | None) -> tuple[str, ...]:
    """The options that say which pictures, for a command that looks at the same ones."""
    if data is None:
        return ()
    return ("--data", data.name, *(("--data-root", data.root) if data.root else ()))


@contextlib.contextmanager
def processes(device: str = "auto") -> Iterator[str]:
    """Join torchrun's processes, of which the first one prints, and yield the device of this one."""
    with joined(device) as chosen:
        if rank():
            silence()
        yield chosen


def check_random(args: Namespace, said: str) -> None:
    """Raise where random weights, of which there is something `said`, are an error."""
    strict = getattr(args, "strict_weights", False) or os.environ.get("NMFX_STRICT_WEIGHTS", "0") not in ("", "0")
    if said and strict:
        raise NmfxError(f"{said}, and --strict-weights forbids them; give --weights FILE to nmfx convert")


def checked(args: Namespace, work: WorkDirectory) -> WorkDirectory:
    """A work directory; raises for random weights where they are an error."""
    check_random(args, work.random)
    return work


def warn_random(work: WorkDirectory) -> None:
    """Repeat what every stage must repeat."""
    if work.random:
        warn(f"{work.random}: anything found reflects shapes only", red=True)


def after_search(work: WorkDirectory, data: tuple[str, ...], scheme: str | None = None) -> list[tuple[str, str]]:
    """What can be done with a scheme: what brings accuracy back comes before the export."""
    data = data or ("--data", DIGITS if work.model == "demo:digits" else "DIR")
    return [
        (work.command("finetune", *data, scheme=scheme), "train it under this scheme"),
        (work.command("correct", *data, scheme=scheme), "new values for kept weights, no training"),
        (work.command("export", scheme=scheme), "as it is"),
    ]


@contextlib.contextmanager
def resumable(text: str) -> Iterator[Progress]:
    """A progress bar for what can be resumed: Ctrl-C waits for the next step, so that nothing is lost."""
    with advancing(text) as advance, asked_to_stop() as stop:

        def progress(share: float, line: str = "", *, lasting: bool = False) -> None:
            if not lasting:
                stop()
            advance(share, line, lasting=lasting)

        yield progress


def check_kernel() -> None:
    """Build or load the sparse kernel; one line if it cannot be had, with what to do."""
    with working("loading the sparse kernel; the first time it is built, which takes a minute"):
        reason = load_kernel()
    if reason:
        warn(f"no sparse kernel, so nothing gets faster than dense: {reason}")
