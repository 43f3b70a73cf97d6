"""The export stage: scheme files, the compressed checkpoint, and on demand baked weights, ONNX and a compiled model."""

from __future__ import annotations

import filecmp
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from nmfx.errors import NmfxError
from nmfx.export.card import HERE, write_card
from nmfx.export.checkpoint import load_checkpoint, save_checkpoint
from nmfx.export.hub import NAMES, save_hub
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
from nmfx.settings.platforms import PLATFORMS
from nmfx.settings.stages import DataSettings, ExportSettings, PrecisionSettings
from nmfx.stages.data import calibration_for
from nmfx.stages.measured import figures_of
from nmfx.stages.runs import Runs, runs_on
from nmfx.stages.work import EXPORT, FINISHING, HUB, SCHEME, WEIGHTS, WorkDirectory, check_free, save_scheme
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
        runs: what will run sparse on the platform that was named; None without one.
        told: lines on what was written, such as how near int8 comes to float32.
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
    runs: Runs | None = None
    told: list[str] = field(default_factory=list)


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
    shared = {f"hub {name}": f"{HUB}/{name}" for name in NAMES} if settings.folder else {}
    return {"scheme": SCHEME, "checkpoint": f"{name}.safetensors"} | formats | shared


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
    precision: PrecisionSettings | None = None,
    pictures: DataSettings | None = None,
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
        precision: of a compiled model; None: float32.
        pictures: that int8 is calibrated on.

    Returns:
        What was written, and where its weights came from.

    Raises:
        NmfxError: no scheme, no last epoch where that is asked for, a format that cannot say it; something is in the way, and
            `force` is false.
    """
    names = file_names(work, settings)
    asked = [name for kind, name in names.items() if kind not in ("scheme", "checkpoint")]
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
    told = list[str]()
    with all_or_nothing(folder) as draft:
        written, said = save_scheme(chosen, draft / names["scheme"], sites)
        if len(written) > 1:
            files = names | {"published": written[1].name}
        else:
            files = names
            check_free([folder / "scheme.txt"], force=force)  # it would contradict the scheme beside it
        save_checkpoint(model, draft / files["checkpoint"], info={**chosen.info, "weights": weights})
        kept = [] if force else _leave_same(draft, folder)
        plain = bake(model, inplace=True)
        calibration = None if precision is None else calibration_for(precision, pictures, plain, work.input_size)
        given = {"progress": progress, "calibration": calibration} | values_of(settings)
        for kind in settings.formats:
            one = FORMATS[kind]
            options = {name: given[name] for name in one.takes}
            told += resolve(one.function)(plain, draft / files[kind], example, **options) or []
            if (beside := draft / f"{files[kind]}.data").is_file():
                files[f"{kind} data"] = beside.name
        if settings.folder:
            (draft / HUB).mkdir()
            taken = (done.path,) if done else (work.path / WEIGHTS, Path(scheme) if scheme else work.scheme_path)
            checkpoint = folder / files["checkpoint"] if files["checkpoint"] in kept else draft / files["checkpoint"]
            card = _card(work, model, chosen, sites, weights, checkpoint, taken)
            save_hub(plain, draft / HUB, chosen, sites, work.source, card, input_size=work.input_size)
        there = settings.platform
        runs = runs_on(there, sites, chosen, draft / files[PLATFORMS[there].format]) if there is not None else None
        notes += [*said, *make_way(list(files.values()))]
    return ExportRecord(files, kept, weights, done.path if done else None, chosen, sites, dense, verified, notes, runs, told)


def _leave_same(draft: Path, folder: Path) -> list[str]:
    """Take out of a draft what the folder has to the last bit, and give the names.

    Raises:
        NmfxError: another file of that name is there.
    """
    same = list[str]()
    for new in sorted(file for file in draft.iterdir() if file.is_file()):
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


def _card(
    work: WorkDirectory, model: nn.Module, scheme: Scheme, sites: Sites, weights: str, checkpoint: Path, taken: tuple[Path, ...]
) -> str:
    """The model card: sizes of what was written, and accuracies that the work directory has recorded of these very weights."""
    figures = figures_of(work.path, {"dense": (work.path / WEIGHTS,), HERE: taken})
    figures += [one for one in figures_of(work.path, {HERE: (checkpoint,)}) if one not in figures]
    config = dict(getattr(model, "pretrained_cfg", None) or {})
    if work.input_size:
        config["input_size"] = work.input_size
    sizes = {"compressed checkpoint of nmfx": checkpoint.stat().st_size}
    return write_card(work.source, scheme, sites, figures, weights=weights, bytes_of=sizes, config=config)
