"""nmfx correct: the masked model's kept weights corrected against the dense network, a step without training or labels."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from nmfx.cli.common import checked, data_options, data_settings, processes, warn_random
from nmfx.cli.console import advancing, hint, output
from nmfx.settings.flags import read_flags
from nmfx.settings.stages import CorrectSettings
from nmfx.stages.correct import correct_weights
from nmfx.stages.work import check_free, need_work


def run(args: Namespace) -> None:
    """Load, correct, write."""
    settings, data, out = read_flags(args, CorrectSettings), data_settings(args), output()
    with processes(args.device) as device:
        work = checked(args, need_work(args.work, "correct"))
        path = Path(args.out) / work.corrected_path.name if args.out else work.corrected_path
        check_free([path], force=args.force)
        with advancing(f"correcting weights on {data.name}") as progress:
            done = correct_weights(
                work, settings, data, path, scheme=args.scheme, device=device, force=args.force, progress=progress
            )
        seen = f"{done.pictures} training pictures of {done.data}, without labels"
        out.print(f"corrected {done.changed} of {len(done.weights)} weights to give the dense network's outputs on {seen}")
        for one in done.weights:
            if not one.chosen.startswith("corrected"):
                out.print(f"  {one}", soft_wrap=True)
        out.print(f"wrote {path}", soft_wrap=True)
        warn_random(work)
        if not args.out:
            hint(
                (work.command("evaluate", *data_options(data)), "what it scores"),
                (work.command("export", scheme=args.scheme), "write it out"),
            )
