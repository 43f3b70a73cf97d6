"""nmfx correct and nmfx recalibrate: the masked model brought near the dense one on pictures, without training or labels."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from nmfx.cli.common import data_settings, hint_scores, processes, work_of
from nmfx.cli.console import advancing, output
from nmfx.settings.flags import read_flags
from nmfx.settings.stages import CorrectSettings, RecalibrateSettings
from nmfx.stages.correct import CorrectRecord, correct_weights, state_beside
from nmfx.stages.recalibrate import recalibrate
from nmfx.stages.work import CORRECTED, RECALIBRATED, check_free
from nmfx.stages.written import remove_state

DOING = {"correct": "correcting weights", "recalibrate": "matching batch norms"}


def run(args: Namespace) -> None:
    """Load, match, write."""
    data = data_settings(args)
    with processes(args.device) as device:
        work = work_of(args)
        place = work.path / (CORRECTED if args.command == "correct" else RECALIBRATED)
        path = Path(args.out) / place.name if args.out else place
        check_free([path], force=args.force)
        if args.command == "correct":
            _go_on(state_beside(path), force=args.force)
        with advancing(f"{DOING[args.command]} on {data.name}") as progress:
            given: dict[str, Any] = {"scheme": args.scheme, "device": device, "force": args.force, "progress": progress}
            if args.command == "correct":
                lines = _corrected(correct_weights(work, read_flags(args, CorrectSettings), data, path, **given))
            else:
                lines = [str(recalibrate(work, read_flags(args, RecalibrateSettings), data, path, **given))]
        for line in lines:
            output().print(line, soft_wrap=True)
        output().print(f"wrote {path}", soft_wrap=True)
        if not args.out:
            hint_scores(work, data, args.scheme, distil=args.command == "correct" and not args.scheme)


def _go_on(state: Path, *, force: bool) -> None:
    """Say that a correction goes on, or begin it anew."""
    for line in remove_state(state) if force else ():
        output().print(line, soft_wrap=True)
    if state.exists():
        output().print(f"going on with {state}; --force starts anew", soft_wrap=True)


def _corrected(done: CorrectRecord) -> list[str]:
    seen = f"{done.pictures} training pictures of {done.data}, without labels"
    said = f"corrected {done.changed} of {len(done.weights)} weights to give the dense network's outputs on {seen}"
    return [said, *(f"  {one}" for one in done.weights if not one.chosen.startswith("corrected"))]
