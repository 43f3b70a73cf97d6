"""nmfx recalibrate: the masked model with its batch norms matched to the dense model's, a step without training."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from nmfx.cli.common import checked, data_options, data_settings, processes, warn_random
from nmfx.cli.console import hint, output, working
from nmfx.settings.flags import read_flags
from nmfx.settings.stages import RecalibrateSettings
from nmfx.stages.recalibrate import recalibrate
from nmfx.stages.work import check_free, need_work


def run(args: Namespace) -> None:
    """Load, match, write."""
    settings, data = read_flags(args, RecalibrateSettings), data_settings(args)
    with processes(args.device) as device:
        work = checked(args, need_work(args.work, "recalibrate"))
        path = Path(args.out) / work.recalibrated_path.name if args.out else work.recalibrated_path
        check_free([path], force=args.force)
        with working(f"matching batch norms on {data.name}"):
            done = recalibrate(work, settings, data, path, scheme=args.scheme, device=device, force=args.force)
        said = f"matched {done.norms} batch norms to the dense network's on {done.pictures} training pictures of {done.data}"
        output().print(said)
        output().print(f"wrote {path}", soft_wrap=True)
        warn_random(work)
        if not args.out:
            hint(
                (work.command("evaluate", *data_options(data)), "what it scores"),
                (work.command("export", scheme=args.scheme), "write it out"),
            )
