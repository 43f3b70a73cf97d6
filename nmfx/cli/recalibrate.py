"""nmfx recalibrate: the masked model with its batch norms matched to the dense model's, a step without training."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sized
from pathlib import Path

from nmfx.cli import work
from nmfx.cli.console import hint, output, working
from nmfx.cli.evaluate import pictures
from nmfx.cli.processes import processes
from nmfx.data.sample import calibration
from nmfx.data.source import Data
from nmfx.errors import NmfxError
from nmfx.export.checkpoint import save_checkpoint
from nmfx.passes.statistics import batch_norms, recalibrate_bn
from nmfx.passes.transform import transform
from nmfx.processes import rank

PICTURES = 512  # looked at, unless told otherwise: more change little


def run(args: Namespace) -> None:
    """Load, match, write."""
    with processes(args.device) as device:
        _run(args, device)


def _run(args: Namespace, device: str) -> None:
    found = work.need_work(args.work, "recalibrate").check(args)
    path = Path(args.out) / found.recalibrated_path.name if args.out else found.recalibrated_path
    work.check_free([path], force=args.force)
    dense = found.load()
    sites = found.sites(dense)
    scheme = found.scheme(sites, args.scheme)
    model = transform(dense, scheme, sites=sites)
    if not (norms := batch_norms(model)):
        raise NmfxError(f"{found.model} has no batch norms to recalibrate; nmfx finetune restores its accuracy")
    data, config = pictures(args, model, found.input_size)
    count = args.pictures or min(PICTURES, _training_pictures(data))
    batch = min(args.batch_size, max(1, count // 2))
    with working(f"matching {len(norms)} batch norms on {count} pictures of {data.name}"):
        batches = calibration(data, config, count=count, batch_size=batch, seed=args.seed, workers=args.workers)
        recalibrate_bn(model.to(device), batches, dense=dense.to(device))
    if rank() == 0:
        info = {**scheme.info, "weights": f"recalibrated, {found.weights}"}
        save_checkpoint(model.cpu(), path, info=info, force=args.force)
    output().print(f"matched {len(norms)} batch norms to the dense network's on {count} training pictures of {data.name}")
    output().print(f"wrote {path}", soft_wrap=True)
    found.warn()
    if not args.out:
        hint(
            (found.command("evaluate", *work.data_options(args)), "what it scores"),
            (found.command("export", scheme=args.scheme), "write it out"),
        )


def _training_pictures(data: Data) -> int:
    return len(data.train) if isinstance(data.train, Sized) else PICTURES
