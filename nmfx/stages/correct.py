"""The correct stage: kept weights get new values, so that layers' outputs come back to the dense network's, without labels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nmfx.export.checkpoint import save_checkpoint
from nmfx.passes.correction import correct
from nmfx.passes.layerwise import Corrected
from nmfx.processes import rank
from nmfx.progress import Progress, silent
from nmfx.settings.stages import CorrectSettings, DataSettings
from nmfx.stages.data import sample_for
from nmfx.stages.work import CORRECTING, WorkDirectory


@dataclass(frozen=True)
class CorrectRecord:
    """What the correct stage did: what became of each weight, on how many training pictures of which data."""

    weights: list[Corrected]
    pictures: int
    data: str
    path: Path

    @property
    def changed(self) -> int:
        """How many weights have new values."""
        return sum(one.chosen.startswith("corrected") for one in self.weights)


def state_beside(path: Path) -> Path:
    """Where a correction that writes `path` keeps what it has done."""
    return path.with_name(Path(CORRECTING).name)


def correct_weights(
    work: WorkDirectory,
    settings: CorrectSettings,
    pictures: DataSettings,
    path: Path,
    *,
    scheme: str | None = None,
    device: str = "cpu",
    force: bool = True,
    progress: Progress = silent,
) -> CorrectRecord:
    """Correct the weights of a work directory's model under `scheme`, or its own, and write it to `path`.

    Args:
        work, settings, pictures: the network, how, and the training pictures.
        path: of the compressed checkpoint; `state_beside` it is, until then, what a run that was stopped goes on with.
        scheme: the file of another scheme.
        device: where it runs.
        force: overwrite `path`.
        progress: told of each weight.

    Raises:
        NmfxError: no scheme, pictures that do not fit, or the state of another correction.
    """
    dense, model, chosen = work.masked(scheme)
    state = state_beside(path)
    name, count, batches = sample_for(settings, pictures, model, work.input_size, least=8)  # the last is held back
    weights = correct(
        model.to(device), batches, dense=dense.to(device), method=settings.method, seed=settings.seed,
        memory=settings.memory * 2**30, checkpoint=state if rank() == 0 else None, progress=progress,
    )  # fmt: skip
    said = {**chosen.info, "weights": f"corrected ({settings.method}), {work.weights}"}
    if rank() == 0:
        save_checkpoint(model.cpu(), path, info=said, force=force)
        state.unlink(missing_ok=True)
    return CorrectRecord(weights, count, name, path)
