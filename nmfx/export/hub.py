"""A folder as model hubs expect it: model.safetensors, config.json, scheme.yaml, README.md. Nothing is uploaded.

model.safetensors is the plain state dict, with real zeros. config.json is what timm's own loader reads
(``timm.create_model("local-dir:FOLDER", pretrained=True)``), with an entry ``nmfx`` that says the rest; timm leaves that alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from msgspec import Meta
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from nmfx.errors import CheckpointError, NmfxError
from nmfx.export.plain import save_baked
from nmfx.files import parsing
from nmfx.files.parsing import Form, Size, Text
from nmfx.masking.sites import masked_sites
from nmfx.models.arguments import parse_kwargs
from nmfx.models.building import build_stored, check_state, load_state
from nmfx.models.census import find_sites
from nmfx.models.site import Sites
from nmfx.models.source import Source, find_source
from nmfx.passes.baking import bake
from nmfx.passes.transform import scheme_of, transform
from nmfx.scheme import Scheme

WEIGHTS, CONFIG, SCHEME, CARD = "model.safetensors", "config.json", "scheme.yaml", "README.md"
NAMES = (WEIGHTS, CONFIG, SCHEME, CARD)
OWN = "nmfx"  # our entry of config.json
VERSION = 1


class _OwnForm(Form, frozen=True):
    version: int
    model: Text
    kwargs: dict[str, Any]
    input_size: Annotated[tuple[Size, ...], Meta(max_length=4)] = ()


def save_hub(
    plain: nn.Module,
    folder: Path,
    scheme: Scheme,
    sites: Sites,
    source: Source,
    card: str,
    *,
    input_size: tuple[int, ...] | None = None,
) -> None:
    """Write the four files of a baked model into a folder that is there and empty.

    Args:
        scheme, sites: what it was masked by.
        source: how it is built.
        card: the text of README.md.
        input_size: of a picture, where it is not the model's own.

    Raises:
        CheckpointError: a weight that its module would make anew (see `save_baked`); arguments that no file may give.
    """
    try:
        parse_kwargs(source.kwargs, str(source))
    except NmfxError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    save_baked(plain, folder / WEIGHTS)
    config: dict[str, Any] = {"architecture": source.name, "library": source.library}
    if source.library == "timm":
        from timm.models._hub import save_config_for_hf  # `save_for_hf`, which is public, refuses weights that are tied

        save_config_for_hf(plain, folder / CONFIG, model_args=dict(source.kwargs))
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if input_size:
            config["pretrained_cfg"]["input_size"] = list(input_size)
    config[OWN] = {"version": VERSION, "model": str(source), "kwargs": dict(source.kwargs), "input_size": input_size or ()}
    (folder / CONFIG).write_text(json.dumps(config, indent=2, default=list), encoding="utf-8")
    scheme.save(folder / SCHEME, sites)
    (folder / CARD).write_text(card, encoding="utf-8")


def is_hub(path: str | Path) -> bool:
    """Whether there is a folder with the config and the scheme that `save_hub` writes."""
    return Path(path).is_dir() and all((Path(path) / name).is_file() for name in (CONFIG, SCHEME))


def load_hub(path: Path, model: nn.Module | None = None) -> nn.Module:
    """The converted model of a folder that `save_hub` wrote, in eval mode; masks are where its weights are not zero.

    Args:
        model: one to load into, in place. None: it is built as config.json says.

    Raises:
        CheckpointError: a file is missing, damaged or of another model, or the weights are not under the scheme.
    """
    own = _read_config(path)
    state = _read_weights(path / WEIGHTS)
    if model is None:
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        try:
            kwargs = parse_kwargs(own.kwargs, f"{path / CONFIG}: {OWN}", CheckpointError)
            model = build_stored(replace(find_source(own.model), kwargs=kwargs), shapes, str(path / WEIGHTS))
        except CheckpointError:
            raise
        except NmfxError as error:
            raise CheckpointError(f"{path}: {parsing.printable(own.model)} cannot be built here: {error}") from error
    elif scheme_of(model):
        bake(model, inplace=True)
    try:
        check_state(model, state, str(path / WEIGHTS))
    except NmfxError as error:
        raise CheckpointError(parsing.printable(str(error))) from error
    load_state(model, state)
    sites = find_sites(model, torch.empty(1, *own.input_size) if own.input_size else None)
    scheme = Scheme.load(path / SCHEME, sites)
    transform(model, scheme, sites=sites, inplace=True)
    for site in masked_sites(model):
        if not torch.equal(site.parameter * site.mask, site.parameter):
            kept = f"{site.spec.pattern} of {SCHEME}"
            raise CheckpointError(f"{path / WEIGHTS}: {site.name} has more weights that are not zero than {kept} keeps")
    return model.eval()


def _read_config(path: Path) -> _OwnForm:
    file = path / CONFIG
    tree = parsing.json_tree(parsing.read_text(file, "a model's config", CheckpointError), str(file), CheckpointError)
    if not isinstance(tree, Mapping) or not isinstance(tree.get(OWN), Mapping):
        raise CheckpointError(f"{file}: has no entry {OWN!r}, so nmfx did not write it; load the model and use nmfx.transform")
    own = parsing.convert(tree[OWN], _OwnForm, f"{file}: {OWN}", CheckpointError)
    if own.version != VERSION:
        raise CheckpointError(f"{file}: version {own.version}, this nmfx reads version {VERSION}")
    return own


def _read_weights(file: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(file))
    except (OSError, SafetensorError) as error:
        said = getattr(error, "strerror", None) or parsing.printable(str(error))
        raise CheckpointError(f"{file}: cannot be read as weights: {said}") from error
