"""Laws of files of weights: whatever a script put around a state dict, its tensors arrive, and what was taken is said."""

from __future__ import annotations

import argparse
import copy
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from awkward import same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nmfx.errors import ModelError
from nmfx.models.building import build_model, load_weights
from nmfx.models.weights import Weights, fit_names, read_weights

State = dict[str, Tensor]
ARGS = argparse.Namespace(model="test_resnet", lr=0.1, data_dir="/data", opt_betas=(0.9, 0.99))


@functools.cache
def template(classes: int) -> Any:
    return build_model("timm:test_resnet", weights="none", kwargs={"num_classes": classes}).model


def network(classes: int = 1000) -> Any:
    return copy.deepcopy(template(classes))


def weights(seed: int, classes: int = 1000) -> State:
    generator = torch.Generator().manual_seed(seed)
    state = network(classes).state_dict()
    return {k: torch.rand(v.shape, generator=generator) if v.is_floating_point() else v.clone() for k, v in state.items()}


LAST, AVERAGED = weights(1), weights(2)


def under(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": value for name, value in state.items()}


def inside(word: str, state: State) -> State:
    return {name.replace("layer1.", f"layer1.{word}.", 1): value for name, value in state.items()}


CHECKPOINTS: dict[str, tuple[Any, State, str]] = {
    "plain": (LAST, LAST, ""),
    "DataParallel": (under("module.", LAST), LAST, "names without their 'module.'"),
    "torch.compile": (under("_orig_mod.", LAST), LAST, "names without their '_orig_mod.'"),
    "compile in DDP": (under("module._orig_mod.", LAST), LAST, "names without their 'module.'"),
    "DDP in compile": (under("_orig_mod.module.", LAST), LAST, "names without their 'module.'"),
    "compiled part": (inside("_orig_mod", LAST), LAST, "names without their '_orig_mod.'"),
    "FSDP": (under("_fsdp_wrapped_module.", LAST), LAST, "names without their '_fsdp_wrapped_module.'"),
    "a part of something": (under("backbone.net.", LAST), LAST, "names without their 'backbone.net.'"),
    "timm's training": (
        {"epoch": 7, "arch": "test_resnet", "state_dict": LAST, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}
        | {"version": 2, "args": ARGS, "amp_scaler": {"scale": 1.0}, "state_dict_ema": AVERAGED, "metric": 71.2},
        AVERAGED,
        "entry 'state_dict_ema', not 'state_dict'",
    ),
    "timm's without averaging": ({"state_dict": LAST, "args": ARGS, "epoch": 1}, LAST, "entry 'state_dict'"),
    "timm's, compiled": (
        {"state_dict": under("_orig_mod.", LAST), "args": ARGS},
        LAST,
        "entry 'state_dict', names without their '_orig_mod.'",
    ),
    "torchvision's training": (
        {"model": LAST, "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}}, "lr_scheduler": {"last_epoch": 3}}
        | {"epoch": 3, "args": ARGS, "model_ema": {"n_averaged": torch.tensor(9), **under("module.", AVERAGED)}},
        AVERAGED,
        "entry 'model_ema', not 'model', names without their 'module.', without n_averaged",
    ),
    "Lightning": (
        {"state_dict": {**under("model.", LAST), "criterion.weight": torch.ones(1000)}, "hyper_parameters": {"lr": 1.0}},
        LAST,
        "entry 'state_dict', names without their 'model.', without criterion.weight",
    ),
    "model_state_dict": ({"model_state_dict": LAST, "epoch": 3, "loss": torch.tensor(0.3)}, LAST, "entry 'model_state_dict'"),
    "an entry of another name": ({"student": LAST, "step": 4}, LAST, "entry 'student'"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_training_checkpoint_is_read(name: str, tmp_path: Path) -> None:
    content, expected, said = CHECKPOINTS[name]
    torch.save(content, path := tmp_path / "best.pth.tar")
    model = network()
    assert load_weights(model, path) == said
    assert same(model.state_dict().values(), expected.values())


def test_what_was_taken_is_noted(tmp_path: Path) -> None:
    for said, state in (("", LAST), (" (names without their 'module.')", under("module.", LAST))):
        torch.save(state, path := tmp_path / "best.pth")
        assert build_model("timm:test_resnet", weights=str(path)).note == f"weights from {path}{said}"


@pytest.mark.parametrize("entry", ["state_dict", "state_dict_ema"])
def test_an_entry_can_be_chosen(entry: str, tmp_path: Path) -> None:
    torch.save({"state_dict": LAST, "state_dict_ema": AVERAGED, "args": ARGS}, path := tmp_path / "last.pth")
    model = network()
    load_weights(model, path, entry=entry)
    assert same(model.state_dict().values(), (LAST if entry == "state_dict" else AVERAGED).values())
    with pytest.raises(
        ModelError, match=r"no entry 'state_dct' of weights \(did you mean 'state_dict'\?\); it has state_dict, state_dict_ema"
    ):
        load_weights(model, path, entry="state_dct")


def other_model() -> Any:
    return {"state_dict": LAST, "model": torch.nn.Linear(2, 2)}


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "another number of classes": (
        lambda: weights(0, 7),
        "made for 7 classes, ResNet is built with 1000; build it with --classes 7 (num_classes=7 in Python)",
    ),
    "the same in a checkpoint": (lambda: {"state_dict": under("module.", weights(0, 7))}, "made for 7 classes"),
    "a whole module": (other_model, "it holds a torch.nn.modules.linear.Linear, and unpickling that can run code"),
    "a path": (lambda: {"state_dict": LAST, "args": argparse.Namespace(out=Path("x"))}, "it holds a pathlib"),
    "two of one kind": (
        lambda: {"a": LAST, "b": AVERAGED},
        "holds several state dicts, a, b: say which, with --weights-entry a",
    ),
    "twice": (
        lambda: {**under("encoder_q.", LAST), **under("encoder_k.", AVERAGED)},
        "the weights are there twice, under 'encoder_q.' and 'encoder_k.'",
    ),
    "no tensors": (lambda: {"epoch": 3}, "holds no state dict of tensors"),
    "a list": (lambda: [1], "holds no state dict of tensors but a list"),
    "another network": (
        lambda: {"state_dict": {"conv1.weight": torch.zeros(2, 2)}},
        "conv1.0.weight (16, 3, 3, 3) is missing",
    ),
    "a larger layer": (lambda: LAST | {"conv1.0.weight": torch.zeros(8, 3, 3, 3)}, "conv1.0.weight has shape (8, 3, 3, 3)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_what_to_do_and_changes_nothing(name: str, tmp_path: Path) -> None:
    make, message = REFUSED[name]
    torch.save(make(), path := tmp_path / "x.pth")
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ModelError, match=re.escape(message)) as caught:
        load_weights(model, path)
    assert str(caught.value).count(str(path)) == 1
    assert "\n" not in str(caught.value)
    assert same(model.state_dict().values(), before.values())


class Runs:
    """What a hostile file would hold beside the Namespace that is let through."""

    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('it ran')",))


def test_a_namespace_lets_nothing_else_in(tmp_path: Path) -> None:
    torch.save({"state_dict": LAST, "args": argparse.Namespace(lr=Runs())}, path := tmp_path / "x.pth")
    with pytest.raises(ModelError, match=r"it holds a [\w.]*exec, and unpickling that can run code"):
        read_weights(path)


WORDS = st.lists(st.sampled_from(["module", "_orig_mod", "model", "net", "backbone", "encoder", "0"]), max_size=3)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(words=WORDS, beside=st.lists(st.sampled_from(["loss.weight", "n_averaged", "ema.step"]), unique=True))
def test_any_prefix_is_taken_off(words: list[str], beside: list[str]) -> None:
    prefix = "".join(f"{word}." for word in words)
    extra = {name: torch.zeros(1) for name in beside} if prefix else {}
    own = {f"{place}.{name}": torch.rand(1) for place in ("stem", "0.model", "module.net") for name in ("weight", "bias")}
    found = fit_names(Weights({**extra, **under(prefix, own)}), own)
    assert found.state == own
    assert set(found.left_out) == set(extra)
