"""The work directory NAME.nmfx/: what the build stage wrote, and every later stage works on.

It holds work.yaml (model, input, where the weights came from), weights.safetensors (the dense weights; none for random ones,
which their seed gives again), start.yaml if they came from a compressed checkpoint (the scheme they are under: no search
goes above its densities), scheme.yaml + scheme.txt once there is a scheme, and a folder for each later stage. Its names, and
how it is read and found, stay together, which takes a few lines more than 300.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import nn

from nmfx import text
from nmfx.errors import NmfxError
from nmfx.export.checkpoint import read_checkpoint
from nmfx.files import parsing
from nmfx.files.drafts import remove_dead_drafts
from nmfx.models.arguments import parse_kwargs
from nmfx.models.building import load_stored
from nmfx.models.census import find_sites
from nmfx.models.example import Example, example_for
from nmfx.models.site import Sites
from nmfx.models.source import Source, find_source
from nmfx.passes.transform import transform
from nmfx.scheme import Scheme
from nmfx.settings.stages import parse_size
from nmfx.stages.epochs import TUNED
from nmfx.stages.written import check_folders, set_aside

VERSION = 1
WORK, WEIGHTS, START, SCHEME = "work.yaml", "weights.safetensors", "start.yaml", "scheme.yaml"
RECALIBRATED, CORRECTED = "recalibrated/model.safetensors", "corrected/model.safetensors"
TUNING, EXPORT, SCORES = "finetune", "export", "evaluation.json"
HUB = "hub"  # the folder for model hubs, within that of the exports
CORRECTING = "corrected/state.safetensors"  # what a correction that was stopped goes on with
SEARCHING = ".search.safetensors"  # in the place of a scheme's ending: what the published loop goes on with
HUBS = ("timm/", "torchvision/", "hf-hub:", "hf_hub:")  # names of models that look like paths
FILES = (".nmfx", ".safetensors", ".yaml", ".yml", ".txt", ".pth", ".pt", ".bin", ".ckpt", ".tar")  # no model is called so
FINISHING = ("finetune", "correct", "recalibrate")  # stages that write a network under the scheme, the best first
KEYS = ("nmfx", "version", "model", "kwargs", "weights", "note", "input_size")


@dataclass(frozen=True)
class Finished:
    """A checkpoint of a work directory's network, and where it says that its weights come from."""

    path: Path
    weights: str


@dataclass(frozen=True)
class WorkDirectory:
    """A work directory: the model's name with its library, where its weights came from, and its input size."""

    path: Path
    model: str
    weights: str
    note: str = ""
    input_size: tuple[int, ...] | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> Source:
        """How the model is built."""
        return replace(find_source(self.model), kwargs=dict(self.kwargs))

    @property
    def scheme_path(self) -> Path:
        """Where the scheme is or will be."""
        return self.path / SCHEME

    @property
    def start_path(self) -> Path:
        """Where the scheme of a compressed checkpoint to start from is, if there is one."""
        return self.path / START

    @property
    def tuned_path(self) -> Path:
        """Where the fine-tuned network is or will be."""
        return self.path / TUNING / TUNED["best"]

    @property
    def recalibrated_path(self) -> Path:
        """Where the masked network with matched batch norms is or will be."""
        return self.path / RECALIBRATED

    @property
    def corrected_path(self) -> Path:
        """Where the masked network with corrected weights is or will be."""
        return self.path / CORRECTED

    @property
    def exported_path(self) -> Path:
        """The compressed checkpoint that the export stage writes."""
        return self.path / EXPORT / f"{self.source.name}.safetensors"

    @property
    def random(self) -> str:
        """What to say of random weights; empty where they are none."""
        return random_weights(self.model, self.weights, self.note)

    def start(self, sites: Sites) -> Scheme | None:
        """The scheme that the weights are under already; None for dense ones."""
        return Scheme.load(self.start_path, sites) if self.start_path.is_file() else None

    def scheme(self, sites: Sites, other: str | Path | None = None) -> Scheme:
        """Its scheme, or that of another file.

        Raises:
            NmfxError: it has none yet, or the file is not there or does not fit.
        """
        if other is None and not self.scheme_path.is_file():
            raise NmfxError(f"{self.path} has no scheme yet; run `{self.command('search')}`, or give --scheme FILE")
        return Scheme.load(other or self.scheme_path, sites)

    def masked(self, other: str | Path | None = None) -> tuple[nn.Module, nn.Module, Scheme]:
        """The dense model, a copy of it under the scheme (see `scheme`), and the scheme."""
        dense = self.load()
        sites = self.sites(dense)
        chosen = self.scheme(sites, other)
        return dense, transform(dense, chosen, sites=sites), chosen

    def command(self, name: str, *options: str, scheme: str | None = None) -> str:
        """A command on this directory, as it can be typed."""
        named = ["--scheme", scheme] if scheme else []
        return shlex.join(["nmfx", name, str(self.path), *options, *named])

    def finished(
        self, scheme: Scheme, epoch: str = "best", stages: Sequence[str] = FINISHING
    ) -> tuple[Finished | None, list[str]]:
        """The network that the first of `stages` wrote under `scheme`; and what is there but is not under it.

        Args:
            scheme: the patterns it has to have.
            epoch: which of the fine-tuned network's: ``best`` or ``last``.
            stages: some of `FINISHING`, in that order.

        Raises:
            NmfxError: the last epoch is wanted, and there is none under this scheme.
        """
        tuned, notes = self.tuned_path.with_name(TUNED[epoch]), list[str]()
        places = {
            "finetune": (tuned, "trained"),
            "correct": (self.corrected_path, "corrected"),
            "recalibrate": (self.recalibrated_path, "recalibrated"),
        }
        for path, how in (places[stage] for stage in stages):
            if path.is_file():
                header = read_checkpoint(path)[0]
                if header.scheme.patterns == scheme.patterns:
                    return Finished(path, header.info.get("weights", "fine-tuned")), notes
                notes.append(f"{path} was {how} under another scheme: it is left out")
            if epoch == "last":
                raise NmfxError(f"{tuned}: no last epoch of a fine-tuning under this scheme; `nmfx finetune` writes it")
        return None, notes

    def build_meta(self) -> nn.Module:
        """The model without weights or memory, built with its arguments."""
        return self.source.build_meta()

    def load(self) -> nn.Module:
        """The dense model."""
        return load_stored(self.source, None if self.random else self.path / WEIGHTS, self.path / WORK)

    def example(self, model: nn.Module) -> Example:
        """The input that the work directory was made with."""
        return example_of(model, self.input_size)

    def sites(self, model: nn.Module) -> Sites:
        """The model's sites."""
        return find_sites(model, self.example(model))

    def to_yaml(self) -> str:
        """The content of work.yaml."""
        head = {"nmfx": "work", "version": VERSION, "model": self.model, "kwargs": json.dumps(dict(self.kwargs))}
        head |= {"weights": self.weights, "note": self.note, "input_size": "x".join(map(str, self.input_size or ()))}
        return yaml.safe_dump(head, sort_keys=False)


def random_weights(model: str, weights: str, note: str = "") -> str:
    """What to say of a model whose weights are ``random``; empty where they are not."""
    return f"{model} has random weights{f' ({note})' if note else ''}" if weights == "random" else ""


def example_of(model: nn.Module, input_size: tuple[int, ...] | None) -> Example:
    """A batch of one random input: of `input_size`, or as the model's configuration says."""
    example = Example((torch.empty(1, *input_size),)) if input_size else example_for(model)
    generator = torch.Generator().manual_seed(0)
    fill = lambda t: torch.rand(t.shape, generator=generator) if t.is_floating_point() else t  # noqa: E731
    return Example(*torch.utils._pytree.tree_map_only(torch.Tensor, fill, (example.args, example.kwargs)))


def pictures_of(example: Example) -> torch.Tensor:
    """The one input of a model that is to be timed.

    Raises:
        NmfxError: it takes others.
    """
    if len(example.args) != 1 or not isinstance(example.args[0], torch.Tensor) or example.kwargs:
        raise NmfxError("speed is measured for models of one input, a batch of pictures")
    return example.args[0]


def directory_for(model: str) -> Path:
    """Where the work directory of a model goes: NAME.nmfx in the current folder."""
    return Path(f"{find_source(model).name}.nmfx")


def save_scheme(scheme: Scheme, path: Path, sites: Sites, *, force: bool = True) -> tuple[list[Path], list[str]]:
    """Write a scheme as YAML, and beside it in the published format where that can say it; what was written, and notes."""
    published = path.with_suffix(".txt")
    check_free([path, published], force=force)
    scheme.save(path, sites, force=force)
    try:
        scheme.save(published, sites, force=force)
    except NmfxError as error:  # a file left there would contradict the scheme beside it
        return [path], [*set_aside(published), f"no {published.name}: {error}"]
    return [path, published], []


def check_free(paths: Iterable[Path], *, force: bool) -> None:
    """Raise if any of these files exists, unless `force`."""
    for path in paths:
        if path.exists() and not force:
            raise NmfxError(f"{path} exists already; give --force to overwrite it, or --out for another name")


class _WorkForm(parsing.Form, frozen=True):
    """work.yaml below its first two lines; `kwargs` are JSON."""

    model: parsing.Text
    weights: Literal["pretrained", "random", "file"]
    kwargs: str = "{}"
    note: str = ""
    input_size: parsing.Text = ""


def open_work(path: Path) -> WorkDirectory:
    """Read a work directory.

    Raises:
        NmfxError: it is none, or leads elsewhere by a link in it.
    """
    check_folders(path, ("export", "export/hub", "finetune", "corrected", "recalibrated", "stages"))
    file = path / WORK
    for folder in (path.parent, path):
        remove_dead_drafts(folder)
    if not file.is_file():
        raise NmfxError(f"{path}: not a work directory (it has no work.yaml); make one with `nmfx convert MODEL`")
    tree = parsing.yaml_tree(parsing.read_text(file, "what nmfx convert writes"), str(file))
    text.check_keys(tree, KEYS, str(file), NmfxError)
    if tree.get("nmfx") != "work" or "model" not in tree or "weights" not in tree:
        raise NmfxError(f"{file}: not written by nmfx convert")
    if (version := tree.get("version")) != str(VERSION):
        said = parsing.printable(str(version), 20)
        raise NmfxError(f"{file}: version {said}, this nmfx reads version {VERSION}; convert the model anew")
    form = parsing.convert({key: tree[key] for key in tree if key not in ("nmfx", "version")}, _WorkForm, str(file))
    kwargs = parse_kwargs(parsing.json_tree(form.kwargs, f"{file}: kwargs"), str(file), NmfxError)
    try:
        find_source(form.model)
        size = parse_size(form.input_size, "input_size")
    except NmfxError as error:
        raise NmfxError(f"{file}: {parsing.printable(str(error), 400)}") from error
    return WorkDirectory(path, form.model, form.weights, form.note, size, kwargs)


def open_converted(model: str, path: Path) -> WorkDirectory:
    """Read the work directory of a model.

    Raises:
        NmfxError: it is of another one.
    """
    there, wanted = open_work(path), str(find_source(model))
    if there.model != wanted:
        raise NmfxError(f"{path} holds {there.model}, not {wanted}; use `nmfx convert {wanted} --out OTHER.nmfx`")
    return there


def find_work(named: str | None, command: str = "search") -> WorkDirectory | None:
    """The work directory named, or the only one in the current folder; None when there is none.

    Raises:
        NmfxError: there are several, or what is named is none; the message says what to do, by an example of `command`.
    """
    if named is not None:
        path = Path(named)
        remove_dead_drafts(path.parent)  # of a conversion that was killed, which may have taken `path` away
        if not path.is_dir():
            near = [str(other) for other in (Path(f"{named}.nmfx"), path.parent) if (other / WORK).is_file()]
            hint = f"did you mean {near[0]}?" if near else f"make one with `nmfx convert {'MODEL' if path.exists() else named}`"
            why = "it is a file" if path.exists() else "there is no such folder"
            raise NmfxError(f"{path}: not a work directory, {why}; {hint}")
        return open_work(path)
    if Path(WORK).is_file():
        return open_work(Path("."))
    found = sorted(entry.parent for entry in Path(".").glob("*.nmfx/work.yaml"))
    if len(found) > 1:
        names = ", ".join(map(str, found))
        raise NmfxError(f"several work directories here: {names}; name one, as in `nmfx {command} {found[0]}`")
    return open_work(found[0]) if found else None


def need_work(named: str | None, command: str) -> WorkDirectory:
    """The same, where there has to be one."""
    if (found := find_work(named, command)) is None:
        raise NmfxError("no work directory here; make one with `nmfx convert MODEL`, then `nmfx search`")
    return found


def asked(named: str | None, command: str) -> str:
    """What a command is to look at: what is named, a path that is there or a model's name, or the work directory here.

    Raises:
        NmfxError: there is nothing here, or what is named looks like a path and is not there.
    """
    if named is not None:
        path, hub = Path(named), named.startswith(HUBS)
        if not path.exists() and not hub and (len(path.parts) > 1 or path.suffix in FILES):
            raise NmfxError(f"{path}: no such file or directory")
        return named
    if (found := find_work(None, command)) is None:
        raise NmfxError(f"no work directory here; name a file, folder or model, as in `nmfx {command} resnet50`")
    return str(found.path)


def around(path: Path) -> WorkDirectory | None:
    """The work directory that a file lies in, as its scheme and its exports do; None when it lies elsewhere."""
    folder = next((folder for folder in list(path.absolute().parents)[:2] if (folder / WORK).is_file()), None)
    return open_work(folder) if folder is not None else None
