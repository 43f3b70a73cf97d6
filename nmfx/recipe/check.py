"""check_recipe: a recipe up to the data: the model, its sites, the search, one update on random pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from nmfx.data.augment import train_transform
from nmfx.data.config import PictureConfig, picture_config
from nmfx.data.pictures import ArrayPictures
from nmfx.data.source import Data
from nmfx.masking.copies import deep_copy
from nmfx.models.site import Sites
from nmfx.passes.transform import transform
from nmfx.passes.verification import verify
from nmfx.recipe.schema import Recipe
from nmfx.scheme import Scheme
from nmfx.settings.methods import METHODS
from nmfx.settings.search import DominoSettings, SearchSettings
from nmfx.settings.stages import FOLDER, FinetuneSettings, ModelSettings
from nmfx.settings.training import Augment
from nmfx.stages.build import BuildRecord, build
from nmfx.stages.data import fit_pictures
from nmfx.stages.pipeline import describe
from nmfx.stages.search import choose
from nmfx.training.finetuning import finetune
from nmfx.training.loss import logits_of

PICTURES = 2  # of one update


def check_recipe(recipe: Recipe, *, device: str = "cpu") -> list[str]:
    """Build, find the sites, search without data, and train one update on random pictures; what was found, line by line.

    Weights that cannot be had here are replaced by random ones, and a search that looks at data by the data-free one; both
    are said.

    Raises:
        NmfxError: whatever the run itself would fail with, before it had read a picture.
    """
    record, lines = _build(recipe.model)
    model, sites = record.model, record.sites
    lines.append(
        f"build: {record.built.source} ({record.built.weights} weights): {len(sites)} sites, {sites.weights:,} weights, "
        f"{sites.macs:,} MACs"
    )
    section = data_free(recipe.search)
    if section != recipe.search:
        lines.append(f"search: {section.method} without data stands in for the search on pictures")
    scheme = choose(section, model, sites, start=record.start).scheme
    lines.append(f"search: {describe(scheme.totals(sites))}")
    if recipe.finetune is not None:
        lines.append(f"finetune: {_update(recipe, recipe.finetune, model.to(device), scheme, sites)}")
    lines.append("no data was used: that the pictures can be read, and what the network scores, has not been checked")
    return lines


def _build(section: ModelSettings) -> tuple[BuildRecord, list[str]]:
    """The model; with random weights where the recipe's cannot be had here."""
    given = section.weights in ("auto", "pretrained", "none") or Path(section.weights).exists()
    weights = {"pretrained": "auto"}.get(section.weights, section.weights) if given else "none"
    record = build(replace(section, weights=weights))
    if record.built.weights != "random" or section.weights == "none":
        return record, []
    why = record.built.note if given else f"{section.weights} is not there"
    return record, [f"build: random weights stand in: {why}"]


def data_free(section: SearchSettings) -> SearchSettings:
    """The same question to a method that needs no pictures."""
    if not section.data:
        return section
    method = type(section).method if METHODS[section.method].pictures == "always" else section.method
    return replace(section, data=False, method=method, sensitivity="", score="magnitude", loop=DominoSettings())


def _update(recipe: Recipe, section: FinetuneSettings, model: nn.Module, scheme: Scheme, sites: Sites) -> str:
    """One update by the recipe's optimiser, loss and masks."""
    size = fit_pictures(_random_data((3, 224, 224), 0), model, recipe.model.size).input_size
    model.eval()
    with torch.no_grad():
        x = torch.rand(1, *size, generator=torch.Generator().manual_seed(0)).to(next(model.parameters()).device)
        data = _random_data(size, logits_of(model(x)).shape[1])
    config, asked = picture_config(model, data, input_size=size), section.settings
    _check_augment(recipe, config, asked.augment)
    mixing = {name: getattr(asked.augment, name) for name in ("mixup", "cutmix", "mixup_prob", "label_smoothing")}
    settings = replace(
        asked,
        epochs=1,
        batch_size=PICTURES,
        warmup_epochs=None,
        accumulate=1,
        compile="",
        tensorboard=False,
        augment=Augment(on=False, **mixing),
    )
    teacher = deep_copy(model) if asked.distill else None
    transform(model, scheme, sites=sites, training=section.training, decay=section.decay, inplace=True)
    result = finetune(model, data, settings=settings, config=config, teacher=teacher)
    shape, groups = "x".join(map(str, size)), verify(model).groups if len(scheme) else 0
    loss = result.epochs[0].train_loss
    return f"one update on {PICTURES} random pictures of {shape}: loss {loss:.4f}, {groups:,} groups hold at most N"


def _check_augment(recipe: Recipe, config: PictureConfig, augment: Augment) -> None:
    """The augmentation is one that timm knows."""
    if recipe.data is not None and recipe.data.name == FOLDER:
        train_transform(config, augment)


def _random_data(size: tuple[int, int, int], classes: int) -> Data:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (PICTURES, *size), dtype=torch.uint8, generator=generator)
    parts = ArrayPictures(x, torch.randint(0, max(1, classes), (PICTURES,), generator=generator))
    return Data("random pictures", classes, (), parts, parts, shape=size)
