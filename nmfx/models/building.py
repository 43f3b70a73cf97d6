"""Models built by name, with the weights that can be had."""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nmfx import text
from nmfx.errors import CheckpointError, ModelError
from nmfx.files.sealed import read_shapes
from nmfx.models.source import Source, find_source
from nmfx.models.weights import fit_names, read_weights

SPARE_BYTES = 512 << 20  # that a model may take beyond what is stored of it: tables that no state dict has


@dataclass(frozen=True)
class Built:
    """A model built by name. ``weights``: pretrained, file, or random; ``note``: why it is not what was hoped for."""

    model: nn.Module
    source: Source
    weights: str
    note: str = ""


def build_model(
    name: str,
    *,
    weights: str = "auto",
    seed: int = 0,
    kwargs: Mapping[str, Any] | None = None,
    entry: str | None = None,
) -> Built:
    """Build a model of torchvision, timm or the demo by name, in eval mode.

    Args:
        weights: ``auto`` takes pretrained weights and goes on with random ones (saying why) when they cannot be had;
            ``pretrained`` makes that an error; ``none`` takes random ones; anything else is a safetensors or .pth file.
        seed: of random weights.
        kwargs: arguments of its builder, such as ``{"num_classes": 10}``.
        entry: which state dict of a training checkpoint (see `load_weights`).

    Returns:
        The model, where it came from, and which weights it has.

    Raises:
        ModelError: unknown name, weights that cannot be had, or a file that does not fit.
    """
    source, note = replace(find_source(name), kwargs=dict(kwargs or {})), ""
    if weights in ("auto", "pretrained"):
        try:
            return Built(source.build(pretrained=True), source, "pretrained")
        except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
            note = f"pretrained weights of {source} cannot be had: {unavailable(error)}"
            if weights == "pretrained":
                raise ModelError(f"{note}. Use --weights FILE, or --weights none for the structure only") from error
    model = build_random(source, seed)
    if weights in ("auto", "none"):
        return Built(model, source, "random", note)
    taken = load_weights(model, Path(weights), entry=entry)
    return Built(model, source, "file", f"weights from {weights}" + (f" ({taken})" if taken else ""))


def build_random(source: Source, seed: int = 0) -> nn.Module:
    """The model with random weights, the same ones for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return source.build()
        except (RuntimeError, ValueError, TypeError) as error:
            given = ", ".join(f"{key}={value}" for key, value in source.kwargs.items())
            with_these = f" with {given}" if given else ""
            raise ModelError(f"{source} cannot be built{with_these}: {text.sentence(error)}") from error


def unavailable(error: BaseException) -> str:
    """Why pretrained weights cannot be had, in a sentence."""
    said = str(error)
    if re.search(r"local cache|disk cache|couldn't find them in the cached", said):  # as huggingface_hub has it, in many words
        return "the hub cannot be reached, and there is no copy in the local cache"
    if found := re.search(r"'num_classes' expected value (\d+) but got (\d+)", said):  # torchvision
        return f"torchvision has them for {found[1]} classes, not for {found[2]}; models of timm take any number"
    return text.sentence(error)


def build_stored(source: Source, shapes: Mapping[str, tuple[int, ...]] | None, origin: str) -> nn.Module:
    """The model that a file asks for, with random weights; first it is built without memory and compared.

    Args:
        shapes: of the tensors that the file stores for it; None where its weights are random.

    Raises:
        ModelError: no such model, it is not the one of the stored tensors, or it needs more than `SPARE_BYTES` beyond them (or
            beyond the model without arguments, where none are stored).
    """
    source = replace(find_source(str(source)), kwargs=source.kwargs)
    if shapes is None and not source.kwargs:
        return build_random(source)
    try:
        meta = build_meta(source)
        if shapes is None:
            stored = _bytes_of(build_meta(replace(source, kwargs={})))
        else:
            check_state(meta, {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, origin)
            stored = sum(8 * math.prod(shape) for shape in shapes.values())
    except (ModelError, RuntimeError) as error:
        raise ModelError(f"{origin}: {str(error).removeprefix(f'{origin}: ')}") from error
    if (needed := _bytes_of(meta)) > stored + SPARE_BYTES:
        raise ModelError(f"{origin}: {source} with {source.kwargs} needs {needed:,} bytes; build it yourself, in Python")
    return build_random(source)


def load_stored(source: Source, weights: Path | None, origin: Path) -> nn.Module:
    """The model that the file `origin` asks for, with the weights stored beside it, or random ones (see `build_stored`).

    Raises:
        ModelError: it cannot be built, or its weights cannot be read, or they do not fit it.
    """
    try:
        shapes = None if weights is None else read_shapes(weights)
    except CheckpointError as error:
        raise ModelError(str(error)) from error
    model = build_stored(source, shapes, str(origin if weights is None else weights))
    if weights is not None:
        load_weights(model, weights)
    return model


def build_meta(source: Source) -> nn.Module:
    """The model of a source that a file gives, without memory.

    Raises:
        ModelError: no such model, or it cannot be built so.
    """
    source = replace(find_source(str(source)), kwargs=source.kwargs)
    try:
        return source.build_meta(strict=True)
    except Exception as error:  # of any library's constructors
        raise ModelError(f"{source} cannot be built with {source.kwargs}: {text.sentence(error)}") from error


def _bytes_of(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def load_weights(model: nn.Module, path: Path, *, entry: str | None = None) -> str:
    """Load a safetensors file, or a .pth/.pt/.bin read with ``weights_only``, into `model`; every key must match.

    Args:
        entry: which state dict of a training checkpoint; None takes averaged weights first, as timm does.

    Returns:
        What was taken of the file, in words; empty for a plain state dict.

    Raises:
        ModelError: the file cannot be read, or the first key that is missing, unknown, of another shape, or a parameter that
            holds NaN or infinite values.
    """
    own = model.state_dict()
    try:
        weights = fit_names(read_weights(path, entry=entry), own)
    except ModelError as error:
        raise ModelError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    check_state(model, weights.state, str(path))
    for name, _ in model.named_parameters():
        value = weights.state.get(name)
        if value is not None and value.is_floating_point() and not bool(value.isfinite().all()):
            raise ModelError(f"{path}: {name} holds NaN or infinite values: the training that wrote it had gone wrong")
    load_state(model, weights.state)
    return str(weights)


def load_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load what `check_state` has found to fit; keys may be missing as it allows.

    safetensors keeps no version numbers of modules, and torchvision's MNASNet refuses a state without: it is one of today.
    """
    versioned = OrderedDict(state)
    versioned._metadata = getattr(state, "_metadata", model.state_dict()._metadata)  # type: ignore[attr-defined]
    model.load_state_dict(versioned, strict=False)


def check_state(model: nn.Module, state: dict[str, Tensor], origin: str) -> None:
    """Check that `state` has the keys and shapes of `model`.

    Raises:
        ModelError: naming the first difference. Missing ``num_batches_tracked`` counters are allowed: old files lack them.
    """
    own = model.state_dict()
    if found := _classes(model, state):
        raise ModelError(
            f"{origin}: made for {found[0]} classes, {type(model).__name__} is built with {found[1]}; build it with "
            f"--classes {found[0]} (num_classes={found[0]} in Python)"
        )
    for key, value in own.items():
        if key not in state and not key.endswith("num_batches_tracked"):
            raise ModelError(f"{origin}: {key} {tuple(value.shape)} is missing; the file holds {len(state)} tensors")
        if key in state and state[key].shape != value.shape:
            raise ModelError(f"{origin}: {key} has shape {tuple(state[key].shape)}, the model expects {tuple(value.shape)}")
    if extra := next((key for key in state if key not in own), None):
        raise ModelError(f"{origin}: {extra} {tuple(state[extra].shape)} is not a weight of {type(model).__name__}")


def _classes(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """Classes of `state` and of `model`, where only they keep them apart: heads that differ in their outputs."""
    own = model.state_dict()
    if own.keys() - state.keys() - {key for key in own if key.endswith("num_batches_tracked")} or state.keys() - own.keys():
        return None
    differing = [key for key, value in own.items() if key in state and state[key].shape != value.shape]
    pairs = {(state[key].shape[:1], own[key].shape[:1]) for key in differing}
    alike = all(state[key].shape[1:] == own[key].shape[1:] and own[key].dim() for key in differing)
    heads = [key for key in own if own[key].dim() > 1][-2:]  # distilled models have two
    if len(pairs) != 1 or not alike or not any(key in heads for key in differing):
        return None
    ((theirs, ours),) = pairs
    return theirs[0], ours[0]
