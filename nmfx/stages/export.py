"""The export stage: scheme files, the compressed checkpoint, and on demand baked weights, ONNX and a compiled model."""

from __future__ import annotations

import filecmp
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nmfx.errors import NmfxError
from nmfx.export.checkpoint import load_checkpoint, save_checkpoint
from nmfx.files.atomic import all_or_nothing
from nmfx.models.site import Sites
from nmfx.passes.baking import bake
from nmfx.passes.transform import transform
from nmfx.passes.verification import Verified, verify
from nmfx.progress import Progress, silent
from nmfx.scheme import Scheme
from nmfx.settings.formats import FORMATS
from nmfx.settings.methods import resolve
from nmfx.settings.option import values_of
from nmfx.settings.stages import ExportSettings
from nmfx.stages.work import EXPORT, FINISHING, SCHEME, WorkDirectory, check_free, save_scheme
from nmfx.stages.written import drop_stamp, leave_stamp


@dataclass(frozen=True)
class ExportRecord:
    """What the export stage wrote.

    Attributes:
        files: by kind (``scheme``, ``published``, ``checkpoint`` and the formats), the names in the folder.
        kept: those names of which the folder had the same to the last bit, and has it still.
        weights: where the weights come from.
        taken: the checkpoint they were taken from; None for those that the work directory was made with.
        dense_bytes: of the dense weights.
        verified: the check of the masks; None without any.
    """

    files: dict[str, str]
    kept: list[str]
    weights: str
    taken: Path | None
    scheme: Scheme
    sites: Sites = field(repr=False)
    dense_bytes: int
    verified: Verified | None
    notes: list[str]


def stamp_export(work: WorkDirectory, settings: ExportSettings, done: ExportRecord, *, own: bool) -> None:
    """Leave the stamp of an export into the work directory, or none where no recipe says it: corrected or recalibrated weights,
    or another scheme than its `own`.
    """
    if not own or done.taken in (work.corrected_path, work.recalibrated_path):
        drop_stamp(work.path, "export")
        return
    before = ("build", "search", "finetune") if done.taken else ("build", "search")
    names = [f"{EXPORT}/{name}" for name in done.files.values()]
    leave_stamp(work.path, "export", values_of(settings), names, before=before)


def file_names(work: WorkDirectory, settings: ExportSettings) -> dict[str, str]:
    """What the stage writes, by kind."""
    name = work.source.name
    formats = {kind: f"{name}{FORMATS[kind].ending}" for kind in settings.formats}
    return {"scheme": SCHEME, "checkpoint": f"{name}.safetensors"} | formats


def export(
    work: WorkDirectory,
    settings: ExportSettings,
    folder: Path,
    *,
    scheme: str | None = None,
    finished: Sequence[str] = FINISHING,
    force: bool = True,
    make_way: Callable[[list[str]], list[str]] = lambda names: [],
    progress: Progress = silent,
) -> ExportRecord:
    """Write a work directory's model under its scheme: with the fine-tuned weights if they are under it, else the corrected or
    recalibrated ones, else those it was made with. All files come at once, or none.

    A format can be added to an earlier export: scheme and checkpoint stay where they are the same.

    Args:
        work: the model and its scheme.
        settings: which epoch of fine-tuning, and the formats.
        folder: where the files go.
        scheme: the file of another scheme.
        finished: the stages whose weights are taken, if there are any; without one, those that the network was made with.
        force: overwrite what is there.
        make_way: told the names of the files before they move to `folder`; its lines become notes.
        progress: told how far a format is that takes long.

    Returns:
        What was written, and where its weights came from.

    Raises:
        NmfxError: no scheme, no last epoch where that is asked for, a format that cannot say it; something is in the way, and
            `force` is false.
    """
    names = file_names(work, settings)
    asked = [names[kind] for kind in settings.formats]
    check_free([folder / name for name in asked or (*names.values(), "scheme.txt")], force=force)
    model = work.load()
    sites, example = work.sites(model), work.example(model)
    chosen = work.scheme(sites, scheme)
    dense = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    done, notes = work.finished(chosen, settings.epoch, finished)
    if done is not None:
        load_checkpoint(done.path, model)
    else:
        transform(model, chosen, sites=sites, inplace=True)
    weights = done.weights if done is not None else work.weights
    verified = verify(model, example_input=example) if len(chosen) else None
    with all_or_nothing(folder) as draft:
        written, said = save_scheme(chosen, draft / names["scheme"], sites)
        if len(written) > 1:
            files = names | {"published": written[1].name}
        else:
            files = names
            check_free([folder / "scheme.txt"], force=force)  # it would contradict the scheme beside it
        save_checkpoint(model, draft / files["checkpoint"], info={**chosen.info, "weights": weights})
        kept = [] if force else _leave_same(draft, folder)
        plain, given = bake(model, inplace=True), {"progress": progress} | values_of(settings)
        for kind in settings.formats:
            one = FORMATS[kind]
            resolve(one.function)(plain, draft / files[kind], example, **{name: given[name] for name in one.takes})
        notes += [*said, *make_way(list(files.values()))]
    return ExportRecord(files, kept, weights, done.path if done else None, chosen, sites, dense, verified, notes)


def _leave_same(draft: Path, folder: Path) -> list[str]:
    """Take out of a draft what the folder has to the last bit, and give the names.

    Raises:
        NmfxError: another file of that name is there.
    """
    same = list[str]()
    for new in sorted(draft.iterdir()):
        there = folder / new.name
        if there.is_file() and not there.is_symlink() and filecmp.cmp(new, there, shallow=False):
            new.unlink()
            same.append(new.name)
        elif there.exists():
            raise NmfxError(
                f"{there} exists already, of another scheme or other weights; give --force to overwrite it, or --out for "
                "another folder"
            )
    return same
