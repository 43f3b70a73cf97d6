"""The folder of a recipe's run, read: the dense model, its sites, the scheme, the pictures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from nmfx.data.config import PictureConfig, check_classes, picture_config
from nmfx.data.source import Data, open_data
from nmfx.errors import ModelError, NmfxError
from nmfx.files import parsing
from nmfx.files.parsing import Text
from nmfx.models.arguments import parse_kwargs
from nmfx.models.building import load_stored
from nmfx.models.census import find_sites
from nmfx.models.example import Example, example_for
from nmfx.models.site import Sites
from nmfx.models.source import Source, find_source
from nmfx.recipe.schema import FOLDER, ModelSection, Recipe
from nmfx.scheme import Scheme

WORK, WEIGHTS, START, SCHEME = "work.yaml", "weights.safetensors", "start.yaml", "scheme.yaml"


@dataclass(frozen=True)
class Dense:
    """What the build stage found: how to build the model, and whether its weights are pretrained, random or of a file."""

    source: Source
    weights: str
    note: str = ""


class _DenseForm(parsing.Form, frozen=True):
    """What the build stage writes; `kwargs` are JSON."""

    nmfx: Literal["work"]
    version: Literal["1"]
    model: Text
    kwargs: str
    weights: Literal["pretrained", "random", "file"]
    note: str
    input_size: str


@dataclass(frozen=True)
class Job:
    """A recipe, the folder it runs in, and what its stages read there."""

    recipe: Recipe
    folder: Path
    device: str = "cpu"

    @cached_property
    def data(self) -> Data:
        """The pictures.

        Raises:
            NmfxError: an image folder, and nobody has said which.
        """
        section = self.recipe.data
        assert section is not None  # the recipe has been checked
        if section.name == FOLDER and not section.root:
            raise NmfxError("the recipe wants an image folder: say which, with --data-root DIR (DIR/train and DIR/val)")
        name, root = (section.root, None) if section.name == FOLDER else (section.name, section.root or None)
        splits = {"train_split": section.train_split, "val_split": section.val_split}
        return open_data(name, root=root, held_back=section.held_back, download=section.download, **splits)  # type: ignore

    @property
    def workers(self) -> int:
        """Processes that read pictures."""
        return self.recipe.data.workers if self.recipe.data else 0

    def pictures(self, model: nn.Module) -> tuple[Data, PictureConfig]:
        """The data, fit for `model`, and how its pictures are brought to it."""
        check_classes(self.data, model)
        return self.data, picture_config(model, self.data, input_size=self.recipe.model.size)

    def dense(self) -> Dense:
        """What the build stage wrote."""
        path = self.folder / WORK
        tree = parsing.yaml_tree(parsing.read_text(path, "what the build stage wrote"), str(path))
        form = parsing.convert({key: tree[key] for key in _DenseForm.__struct_fields__ if key in tree}, _DenseForm, str(path))
        kwargs = parse_kwargs(parsing.json_tree(form.kwargs, f"{path}: kwargs"), str(path), NmfxError)
        try:
            source = find_source(form.model)
        except ModelError as error:
            raise NmfxError(f"{path}: model: {parsing.printable(str(error), 400)}") from error
        return Dense(replace(source, kwargs=kwargs), form.weights, form.note)

    def model(self) -> nn.Module:
        """The dense model."""
        dense = self.dense()
        return load_stored(dense.source, None if dense.weights == "random" else self.folder / WEIGHTS, self.folder / WORK)

    def sites(self, model: nn.Module) -> Sites:
        """The model's sites."""
        return find_sites(model, example_of(model, self.recipe.model))

    def start(self, sites: Sites) -> Scheme | None:
        """The scheme that the model's weights are under already, if they came from a compressed checkpoint."""
        return Scheme.load(self.folder / START, sites) if (self.folder / START).is_file() else None

    def scheme(self, sites: Sites) -> Scheme:
        """What the search stage wrote."""
        return Scheme.load(self.folder / SCHEME, sites)


def example_of(model: nn.Module, section: ModelSection) -> Example:
    """One random input, of the size the recipe says or the model states."""
    example = Example((torch.empty(1, *section.size),)) if section.size else example_for(model)
    generator = torch.Generator().manual_seed(0)
    fill = lambda t: torch.rand(t.shape, generator=generator) if t.is_floating_point() else t  # noqa: E731
    return Example(*torch.utils._pytree.tree_map_only(torch.Tensor, fill, (example.args, example.kwargs)))
