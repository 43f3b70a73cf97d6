"""The recalibrate stage: the masked model's batch norms matched to the dense model's, without training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nmfx.errors import NmfxError
from nmfx.export.checkpoint import save_checkpoint
from nmfx.passes.statistics import batch_norms, recalibrate_bn
from nmfx.processes import rank
from nmfx.progress import Progress, silent
from nmfx.settings.stages import DataSettings, RecalibrateSettings
from nmfx.stages.data import sample_for
from nmfx.stages.work import WorkDirectory


@dataclass(frozen=True)
class RecalibrateRecord:
    """What the recalibrate stage did: how many norms it matched, on how many training pictures of which data."""

    norms: int
    pictures: int
    data: str
    path: Path

    def __str__(self) -> str:
        seen = f"{self.pictures} training pictures of {self.data}"
        return f"matched {self.norms} batch norms to the dense network's on {seen}"


def recalibrate(
    work: WorkDirectory,
    settings: RecalibrateSettings,
    pictures: DataSettings,
    path: Path,
    *,
    scheme: str | None = None,
    device: str = "cpu",
    force: bool = True,
    progress: Progress = silent,
) -> RecalibrateRecord:
    """Match the batch norms of a work directory's model under `scheme`, or its own, and write it to `path`.

    Args:
        work, settings, pictures: the network, how, and the training pictures.
        path: of the compressed checkpoint.
        scheme: the file of another scheme.
        device: where it runs.
        force: overwrite `path`.
        progress: told when the pictures are there.

    Returns:
        How many norms were matched, on what.

    Raises:
        NmfxError: no scheme, no batch norms, pictures that do not fit.
    """
    dense, model, chosen = work.masked(scheme)
    if not (norms := batch_norms(model)):
        raise NmfxError(f"{work.model} has no batch norms to recalibrate; nmfx finetune restores its accuracy")
    name, count, batches = sample_for(settings, pictures, model, work.input_size, least=2)
    progress(0.0, f"matching {len(norms)} batch norms on {count} pictures of {name}")
    recalibrate_bn(model.to(device), batches, dense=dense.to(device))
    if rank() == 0:
        save_checkpoint(model.cpu(), path, info={**chosen.info, "weights": f"recalibrated, {work.weights}"}, force=force)
    return RecalibrateRecord(len(norms), count, name, path)
