"""The work directory NAME.nmfx/: what `nmfx convert` found, and every later stage works on.

It holds work.yaml (model, input, where the weights came from), weights.safetensors (the dense weights; none for random ones,
which their seed gives again), start.yaml if they came from a compressed checkpoint (the scheme they are under: no search
goes above its densities), and scheme.yaml + scheme.txt once there is a scheme.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import nn

from nmfx import text
from nmfx.cli.console import warn
from nmfx.errors import NmfxError
from nmfx.export.checkpoint import read_checkpoint
from nmfx.export.plain import save_baked
from nmfx.files import parsing
from nmfx.files.atomic import remove_dead_drafts, replace_folder
from nmfx.models.arguments import is_picture, parse_kwargs
from nmfx.models.building import Built, load_stored
from nmfx.models.census import find_sites
from nmfx.models.example import Example, example_for
from nmfx.models.site import Sites
from nmfx.models.source import SOURCE, Source, find_source
from nmfx.recipe.tuned import TUNED
from nmfx.recipe.written import check_folders, set_aside, strangers
from nmfx.scheme import Scheme

VERSION = 1
HUBS = ("timm/", "torchvision/", "hf-hub:", "hf_hub:")  # names of models that look like paths
FILES = (".nmfx", ".safetensors", ".yaml", ".yml", ".txt", ".pth", ".pt", ".bin", ".ckpt", ".tar")  # no model is called so
EXPORTS = (".safetensors", ".baked.safetensors", ".onnx")
OURS = {
    *("work.yaml", "weights.safetensors", "start.yaml", "scheme.yaml", "scheme.txt", "scheme.search.safetensors"),
    *(f"finetune/{name}" for name in ("last.safetensors", "best.safetensors", "log.csv", *TUNED.values())),
    *("recalibrated/model.safetensors", "export/scheme.yaml", "export/scheme.txt", "evaluation.json"),
    *(f"stages/{name}.json" for name in ("build", "search", "finetune", "export", "evaluate", "written")),
}  # what may lie in a work directory
KEYS = ("nmfx", "version", "model", "kwargs", "weights", "note", "input_size")


@dataclass(frozen=True)
class Work:
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
        return self.path / "scheme.yaml"

    @property
    def start_path(self) -> Path:
        """Where the scheme of a compressed checkpoint to start from is, if there is one."""
        return self.path / "start.yaml"

    @property
    def tuned_path(self) -> Path:
        """Where the fine-tuned network is or will be."""
        return self.path / "finetune" / "model.safetensors"

    @property
    def recalibrated_path(self) -> Path:
        """Where the masked network with matched batch norms is or will be."""
        return self.path / "recalibrated" / "model.safetensors"

    def start(self, sites: Sites) -> Scheme | None:
        """The scheme that the weights are under already; None for dense ones."""
        return Scheme.load(self.start_path, sites) if self.start_path.is_file() else None

    def warn(self) -> None:
        """Repeat what every stage must repeat."""
        if self.weights == "random":
            warn(f"{self.random}: anything found reflects shapes only", red=True)

    def check(self, args: Namespace) -> Work:
        """Itself; raises NmfxError for random weights where they are an error."""
        if self.weights == "random":
            check_random(args, self.random)
        return self

    @property
    def random(self) -> str:
        """What to say of random weights."""
        return random_weights(self.model, self.note)

    def scheme(self, sites: Sites, other: str | None = None) -> Scheme:
        """Its scheme, or that of another file.

        Raises:
            NmfxError: it has none yet, or the file is not there or does not fit.
        """
        if other is None and not self.scheme_path.is_file():
            raise NmfxError(f"{self.path} has no scheme yet; run `{self.command('search')}`, or give --scheme FILE")
        return Scheme.load(other or self.scheme_path, sites)

    def command(self, name: str, *options: str, scheme: str | None = None) -> str:
        """A command on this directory, as it can be typed."""
        named = ["--scheme", scheme] if scheme else []
        return shlex.join(["nmfx", name, str(self.path), *options, *named])

    def finished(self, scheme: Scheme, epoch: str = "best") -> Path | None:
        """The fine-tuned network, or else the recalibrated one, if it is under `scheme`; says if there is one that is not.

        Args:
            epoch: which of the fine-tuned network's: ``best`` or ``last``.

        Raises:
            NmfxError: the last epoch is wanted, and there is none under this scheme.
        """
        tuned = self.tuned_path.with_name(TUNED[epoch])
        if epoch == "last" and not (tuned.is_file() and read_checkpoint(tuned)[0].scheme.patterns == scheme.patterns):
            raise NmfxError(f"{tuned}: no last epoch of a fine-tuning under this scheme; `nmfx finetune` writes it")
        for path, how in ((tuned, "trained"), (self.recalibrated_path, "recalibrated")):
            if path.is_file():
                if read_checkpoint(path)[0].scheme.patterns == scheme.patterns:
                    return path
                warn(f"{path} was {how} under another scheme: it is left out")
        return None

    def build_meta(self) -> nn.Module:
        """The model without weights or memory, built with its arguments."""
        return self.source.build_meta()

    def load(self) -> nn.Module:
        """The dense model."""
        weights = None if self.weights == "random" else self.path / "weights.safetensors"
        return load_stored(self.source, weights, self.path / "work.yaml")

    def example(self, model: nn.Module) -> Example:
        """The input that the work directory was made with."""
        return example_of(model, self.input_size)

    def sites(self, model: nn.Module) -> Sites:
        """The model's sites."""
        return find_sites(model, self.example(model))


def random_weights(model: str, note: str = "") -> str:
    """What to say of a model with random weights."""
    return f"{model} has random weights{f' ({note})' if note else ''}"


def check_random(args: Namespace, said: str) -> None:
    """Raise where random weights are an error: by --strict-weights, or NMFX_STRICT_WEIGHTS in the environment."""
    if getattr(args, "strict_weights", False) or os.environ.get("NMFX_STRICT_WEIGHTS", "0") not in ("", "0"):
        raise NmfxError(f"{said}, and --strict-weights forbids them; give --weights FILE to nmfx convert")


def data_options(args: Namespace) -> tuple[str, ...]:
    """The options that say which pictures, for a command that looks at the same ones."""
    root = ("--data-root", args.data_root) if args.data_root else ()
    return ("--data", args.data, *root)


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


def parse_size(size: str | None) -> tuple[int, ...] | None:
    """``3x224x224`` as numbers; one number means a square colour picture.

    Raises:
        NmfxError: anything else.
    """
    if size is None:
        return None
    parts = size.lower().replace(",", "x").split("x")
    if all(re.fullmatch(r"0*[1-9][0-9]{0,5}", part) for part in parts) and len(parts) <= 5:
        numbers = tuple(map(int, parts))
        numbers = (3, *numbers, *numbers) if len(numbers) == 1 else numbers
        if is_picture(numbers):
            return numbers
    raise NmfxError(f"--input-size {size[:40]}: expected the input without its batch, as in 3x224x224")


def directory_for(model: str) -> Path:
    """Where the work directory of a model goes: NAME.nmfx in the current folder."""
    return Path(f"{find_source(model).name}.nmfx")


def create(
    path: Path,
    built: Built,
    input_size: tuple[int, ...] | None,
    scheme: Scheme | None,
    sites: Sites,
    *,
    start: Scheme | None = None,
    force: bool,
) -> Work:
    """Write a work directory whole: into a temporary one beside it, then renamed; `start`: what the weights are under.

    Raises:
        NmfxError: it exists and `force` is false, or is no work directory of ours.
    """
    check_absent(path, force=force)
    source = getattr(built.model, SOURCE, built.source)
    parse_kwargs(source.kwargs, f"{path}: {source}", NmfxError)  # or it could not be read again
    work = Work(path, str(source), built.weights, built.note, input_size, source.kwargs)

    def write(folder: Path) -> None:
        size = "x".join(map(str, input_size)) if input_size else ""
        head = {"nmfx": "work", "version": VERSION, "model": work.model, "kwargs": json.dumps(dict(work.kwargs))}
        head |= {"weights": work.weights, "note": work.note}
        head["input_size"] = size
        (folder / "work.yaml").write_text(yaml.safe_dump(head, sort_keys=False), encoding="utf-8")
        if work.weights != "random":
            save_baked(built.model, folder / "weights.safetensors")
        if start is not None:
            start.save(folder / work.start_path.name, sites)
        if scheme is not None:
            save_scheme(scheme, folder / "scheme.yaml", sites)

    replace_folder(path, write)
    return work


def check_absent(path: Path, *, force: bool) -> None:
    """Raise unless `path` can be written as a work directory."""
    if path.exists() and not (path / "work.yaml").is_file():
        raise NmfxError(f"{path} exists and is no work directory of nmfx; choose another name with --out")
    if path.exists() and not force:
        raise NmfxError(f"{path} exists already; give --force to replace it, or --out for another name")
    if path.exists():
        _check_replaceable(path)


def _check_replaceable(path: Path) -> None:
    """Raise if a work directory that is to be replaced holds a user's own files; the names that nmfx gives are --force's."""
    try:
        name = open_work(path).model.partition(":")[2]
    except NmfxError:  # damaged: --force is for that, too
        name = path.name.removesuffix(".nmfx")
    others = strangers(path, {*OURS, *(f"export/{name}{ending}" for ending in EXPORTS)})
    if others:
        shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        raise NmfxError(f"{path} would be replaced, but nmfx did not write {shown} in it: move what you need, or give --out")


def save_scheme(scheme: Scheme, path: Path, sites: Sites, *, force: bool = True) -> list[Path]:
    """Write a scheme as YAML, and beside it in the published format where that can say it."""
    published = path.with_suffix(".txt")
    check_free([path, published], force=force)
    scheme.save(path, sites, force=force)
    try:
        scheme.save(published, sites, force=force)
    except NmfxError as error:
        for line in set_aside(published):  # it would contradict the scheme beside it
            warn(line)
        warn(f"no {published.name}: {error}")
        return [path]
    return [path, published]


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


def open_work(path: Path) -> Work:
    """Read a work directory.

    Raises:
        NmfxError: it is none, or leads elsewhere by a link in it.
    """
    check_folders(path, ("export", "finetune", "recalibrated"))
    file = path / "work.yaml"
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
        size = parse_size(form.input_size or None)
    except NmfxError as error:
        said = str(error).replace("--input-size", "input_size")
        raise NmfxError(f"{file}: {parsing.printable(said, 400)}") from error
    return Work(path, form.model, form.weights, form.note, size, kwargs)


def find_work(named: str | None, command: str = "search") -> Work | None:
    """The work directory named, or the only one in the current folder; None when there is none.

    Raises:
        NmfxError: there are several, or what is named is none; the message says what to do, by an example of `command`.
    """
    if named is not None:
        path = Path(named)
        remove_dead_drafts(path.parent)  # of a conversion that was killed, which may have taken `path` away
        if not path.is_dir():
            near = [str(other) for other in (Path(f"{named}.nmfx"), path.parent) if (other / "work.yaml").is_file()]
            hint = f"did you mean {near[0]}?" if near else f"make one with `nmfx convert {'MODEL' if path.exists() else named}`"
            why = "it is a file" if path.exists() else "there is no such folder"
            raise NmfxError(f"{path}: not a work directory, {why}; {hint}")
        return open_work(path)
    if Path("work.yaml").is_file():
        return open_work(Path("."))
    found = sorted(entry.parent for entry in Path(".").glob("*.nmfx/work.yaml"))
    if len(found) > 1:
        names = ", ".join(map(str, found))
        raise NmfxError(f"several work directories here: {names}; name one, as in `nmfx {command} {found[0]}`")
    return open_work(found[0]) if found else None


def need_work(named: str | None, command: str) -> Work:
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


def around(path: Path) -> Work | None:
    """The work directory that a file lies in, as its scheme and its exports do; None when it lies elsewhere."""
    folder = next((folder for folder in list(path.absolute().parents)[:2] if (folder / "work.yaml").is_file()), None)
    return open_work(folder) if folder is not None else None
