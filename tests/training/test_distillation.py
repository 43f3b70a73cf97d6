"""Laws of distillation without labels: labels do not matter, statistics and masks stay, it comes nearer or is not kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from nmfx.data.config import picture_config
from nmfx.data.pictures import ArrayPictures
from nmfx.data.sample import calibration, few_pictures
from nmfx.data.source import Data, open_data
from nmfx.demo.digits import load_demo
from nmfx.errors import DataError, NmfxError
from nmfx.masking.sites import masked_sites
from nmfx.passes.correction import correct
from nmfx.passes.statistics import batch_norms
from nmfx.passes.transform import transform
from nmfx.settings.flags import Parser, add_flags, read_flags
from nmfx.settings.option import section
from nmfx.settings.stages import DISTILLATION, FinetuneSettings
from nmfx.training.evaluation import evaluate
from nmfx.training.finetuning import finetune
from nmfx.training.masks import set_training
from nmfx.training.record import Progress
from nmfx.training.trainer import AnsweredBy, epochs_within, load_best

SETTINGS = replace(DISTILLATION.settings, epochs=3, save_seconds=0.0)


@pytest.fixture(scope="module")
def few() -> Data:
    return few_pictures(open_data("digits"), 480, hold_back=True)


def corrected() -> nn.Module:
    model = transform(load_demo(trained=True), "2:16", example_input=torch.zeros(1, 1, 8, 8))
    data = open_data("digits")
    correct(model, calibration(data, picture_config(model, data), count=240, batch_size=16))
    set_training(model, "fixed")
    return model


def answers(model: nn.Module, data: Data) -> float:
    """Loss to the dense network's answers on the held-back pictures."""
    batches = calibration(replace(data, train=data.validation), picture_config(model, data), count=len(data.validation))  # type: ignore
    return evaluate(model, AnsweredBy(load_demo(trained=True).eval(), batches, torch.device("cpu"))).loss


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def test_labels_do_not_matter_statistics_and_masks_stay_and_it_comes_nearer(few: Data) -> None:
    assert isinstance(few.train, ArrayPictures)
    assert isinstance(few.validation, ArrayPictures)
    wrong = replace(few, train=replace(few.train, labels=few.train.labels.flip(0)))
    wrong = replace(wrong, validation=replace(few.validation, labels=9 - few.validation.labels))
    found = []
    for data in (few, wrong):
        model = corrected()
        before, masks = state(model), [site.mask.clone() for site in masked_sites(model)]
        finetune(model, data, settings=replace(SETTINGS, epochs=30), teacher=load_demo(trained=True))
        found.append(state(model))
        for name in batch_norms(model):
            for key in (f"{name}.running_mean", f"{name}.running_var"):
                assert torch.equal(before[key], found[-1][key])
        assert all(torch.equal(site.mask, mask) for site, mask in zip(masked_sites(model), masks, strict=True))
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())
    assert answers(model, few) < answers(corrected(), few)


def test_the_last_epoch_counts_and_a_stopped_run_goes_on(few: Data, tmp_path: Path) -> None:
    model, teacher = corrected(), load_demo(trained=True)
    result = finetune(model, few, settings=SETTINGS, teacher=teacher, folder=tmp_path / "whole")
    best = corrected()
    assert load_best(tmp_path / "whole", best) == result.best == result.epochs[-1]
    assert answers(best, few) == pytest.approx(result.best.loss, rel=1e-5)

    def stop(now: Progress) -> None:
        if (now.epoch, now.step) == (1, 0):
            raise KeyboardInterrupt

    other = corrected()
    with pytest.raises(KeyboardInterrupt):
        finetune(other, few, settings=SETTINGS, teacher=teacher, folder=tmp_path / "cut", progress=stop)
    other = corrected()
    finetune(other, few, settings=SETTINGS, teacher=teacher, folder=tmp_path / "cut")
    assert all(torch.equal(value, state(model)[key]) for key, value in state(other).items())


def test_masks_that_are_fixed_are_those_of_the_weights_that_were_loaded() -> None:
    example = torch.zeros(1, 1, 8, 8)
    model, other = (transform(load_demo(trained=trained), "2:16", example_input=example) for trained in (True, False))
    model.load_state_dict(other.state_dict())
    set_training(model, "fixed")
    for one, two in zip(masked_sites(model), masked_sites(other), strict=True):
        assert torch.equal(one.mask, two.mask)
        assert torch.equal(one.value, two.value)


def test_it_needs_the_dense_network(few: Data) -> None:
    with pytest.raises(NmfxError, match="give finetune"):
        finetune(corrected(), few, settings=SETTINGS)


def test_epochs_within_a_time_grow_with_it_and_leave_the_model(few: Data) -> None:
    model, teacher = corrected(), load_demo(trained=True)
    before = state(model)
    assert epochs_within(1e-6, model, few, SETTINGS, teacher=teacher) == 1
    assert epochs_within(100, model, few, SETTINGS, teacher=teacher) > 10
    assert all(torch.equal(value, before[key]) for key, value in state(model).items())


def test_few_pictures_are_those_that_correction_saw_and_held_back_ones_are_no_others() -> None:
    data = open_data("digits")
    few = few_pictures(data, 160, seed=3, hold_back=True)
    assert (len(few.train), len(few.validation)) == (140, 20)  # type: ignore[arg-type]
    assert isinstance(few.train, ArrayPictures)
    assert isinstance(few.validation, ArrayPictures)
    seen = torch.cat([x for x, _ in calibration(data, picture_config(load_demo(trained=True), data), count=160, seed=3)])
    both = torch.cat([few.train.pictures, few.validation.pictures])
    own = [tuple(picture.flatten().tolist()) for picture in both]
    assert len({*own}) == len({tuple(picture.flatten().tolist()) for picture in seen})
    assert few_pictures(data, None) is data
    for count, message in ((7, "expected 8 or more"), (10_000, "there are 1198")):
        with pytest.raises(DataError, match=message):
            few_pictures(data, count)


def test_a_folder_without_classes_is_enough_where_no_labels_are_needed(tmp_path: Path) -> None:
    for index in range(20):
        Image.new("RGB", (9, 9), (index * 10, 0, 0)).save(tmp_path / f"{index}.png")
    with pytest.raises(DataError, match="no class folders"):
        open_data(str(tmp_path))
    data = open_data(str(tmp_path), labels=False)
    few = few_pictures(data, None, hold_back=True)
    assert (len(data.train), len(few.train), len(few.validation)) == (20, 18, 2)  # type: ignore[arg-type]
    inner = tmp_path / "one"
    inner.mkdir()
    Image.new("RGB", (9, 9)).save(inner / "a.png")
    assert len(open_data(str(tmp_path), labels=False).train) == 21  # type: ignore[arg-type]
    for name in ("two", "three"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (9, 9), (index, 0, 0)).save(tmp_path / "classes" / name / f"{index}.png")
    assert open_data(str(tmp_path / "classes"), labels=False).classes == 2


def with_settings(minutes: float | None, **changes: Any) -> FinetuneSettings:
    return replace(DISTILLATION, minutes=minutes, settings=replace(DISTILLATION.settings, **changes))


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ({}, FinetuneSettings()),
        ({"distill_only": "true"}, DISTILLATION),
        ({"distill_only": "false"}, FinetuneSettings()),
        ({"distill_only": "true", "epochs": "7"}, with_settings(minutes=None, epochs=7)),
        ({"distill_only": "true", "lr": "0.1", "minutes": "2"}, with_settings(minutes=2.0, lr=0.1)),
    ],
)
def test_distill_only_has_settings_of_its_own_in_recipes_and_flags(said: dict[str, str], wanted: FinetuneSettings) -> None:
    assert section(said, FinetuneSettings, "recipe") == wanted
    parser = Parser()
    add_flags(parser, FinetuneSettings)
    typed = [part for key, value in said.items() for part in _flag(key, value)]
    assert read_flags(parser.parse_args(typed), FinetuneSettings) == wanted
    kept = section({**said, "augment": {"hflip": "0"}}, FinetuneSettings, "recipe").settings.augment
    assert kept == replace(wanted.settings.augment, hflip=0.0)


def _flag(key: str, value: str) -> list[str]:
    flag = f"--{key.replace('_', '-')}"
    return [flag] if value == "true" else [] if value == "false" else [flag, value]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"minutes": "1", "epochs": "2"}, "'minutes' says how many epochs; leave 'epochs' out"),
        ({"distill_only": "true", "weights": "none"}, "'weights' says nothing beside 'distill_only"),
        ({"distill_only": "true", "distill": "0.5"}, "'distill' says nothing beside 'distill_only"),
    ],
)
def test_what_would_be_ignored_is_refused(said: dict[str, str], message: str) -> None:
    with pytest.raises(NmfxError, match=message):
        section(said, FinetuneSettings, "recipe")
