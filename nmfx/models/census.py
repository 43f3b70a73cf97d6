"""Which parameters are used as weights, found by use, and why every other one is not (see `following` for how)."""

from __future__ import annotations

import logging
import re
from typing import Any

import torch
from torch import nn

from nmfx.errors import TraceError
from nmfx.masking.copies import throw_away_copy
from nmfx.masking.owner import can_derive
from nmfx.models.example import Example, example_for
from nmfx.models.following import Census, Use, plain_kernels
from nmfx.models.places import Part, describe, join_parts
from nmfx.models.products import PRODUCTS
from nmfx.models.site import Site, Sites, Skipped
from nmfx.sparsity.layout import Rows

log = logging.getLogger(__name__)

# Parameters that take part in a matmul as data, by the name of their attribute: position tables, tokens, learned queries.
POSITION_TABLE = re.compile(r"(^|_)(rel|pos|relative|position|tokens?|latents?)(_|\d*$)|pos_?emb|rel_?pos|bias_table")
ADAPTER = re.compile(r"(^|[._])lora_")  # beside a weight that they are added to, sooner or later

READ_AS = {  # why a parameter that no matmul reads as a weight is left out, by the first operation that names it
    "embedding": "looked up as a table (embedding)",
    "index": "a table, read by index",
    "gather": "a table, read by index",
    "upsample": "a table, interpolated",
    "add": "added to activations (position, token or bias)",
    "mul": "multiplied elementwise (a scale)",
    "cat": "joined to activations (a token)",
    "expand": "joined to activations (a token)",
    "copy": "joined to activations (a token)",
    "norm": "scale of a normalisation",
}
LOST = "zeros do not reach the operation"


def _run(model: nn.Module, example: Example, *, train: bool) -> Census:
    model.train(train)
    census = Census(model.parameters(), (example.args, example.kwargs), model.buffers())
    census.watch(model)
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), plain_kernels(), census:
        model(*example.args, **example.kwargs)
    return census


def _with_values(model: nn.Module) -> nn.Module:
    """The model on the CPU; weights that were on the meta device become small random numbers."""
    values = [t for t in (*model.parameters(), *model.buffers()) if t.device.type == "meta"]
    if not values:
        model.cpu()
        for parameter in model.parameters():  # strides are read as positions in the parameter
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        return model
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.normal_(std=0.02) if tensor.is_floating_point() else tensor.zero_()
    return model


def _has_guessed(copy: nn.Module, census: Census) -> bool:
    """Whether a weight was read by an index whose values only the CPU knows."""
    named = ((name, census.uses.get(id(parameter))) for name, parameter in copy.named_parameters())
    return any(use is not None and use.guessed for name, use in named if not POSITION_TABLE.search(name.rpartition(".")[2]))


def take_census(model: nn.Module, example: Example) -> tuple[nn.Module, Census, Census | None]:
    """Follow all parameters of a throw-away copy of `model` through one eval and one train forward.

    Runs on the meta device; a model that asks for values on the way (detectors) runs on the CPU.

    Returns:
        The copy, the eval census, and the train census (None when the model cannot run in train mode on this input).

    Raises:
        TraceError: the forward fails on the CPU too.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    for device in ("meta", "cpu"):
        try:
            copy = throw_away_copy(model, "meta") if device == "meta" else _with_values(throw_away_copy(model, None))
            placed = example.to(device, dtype)
            with torch.device(device):
                census = _run(copy, placed, train=False)
            if device == "meta" and not any(p.is_meta for p in model.parameters()) and _has_guessed(copy, census):
                continue
            break
        except Exception as error:
            if device == "cpu":
                raise TraceError(
                    f"{type(model).__name__}: the forward pass fails on {example}: {type(error).__name__}: {error}. "
                    f"Give example_input= (--input-size) as the model expects it"
                ) from error
            log.debug("census on the meta device failed, running on the CPU: %r", error)
    try:
        with torch.device(device):
            return copy, census, _run(copy, placed.doubled(), train=True)
    except Exception as error:
        log.debug("no train-mode census: %r", error)
        return copy, census, None


def find_sites(model: nn.Module, example_input: Any = None) -> Sites:
    """Every weight of `model` that can take a pattern, by use, and every other parameter with the reason.

    Args:
        example_input: a tensor, a tuple of positional or a dict of keyword arguments of the forward pass; only shapes and
            dtypes matter. None: from the model's own configuration, else 1x3x224x224.

    Returns:
        Sites in module order. MACs are per sample, of the eval forward. Depthwise convolutions are sites with a group axis of
        length 1: they count in every total, and stay dense by the policy of the scheme.

    Raises:
        TraceError: the forward pass fails on the example input.

    The model is not changed: a copy runs on the meta device (CPU memory is used only by models that need values).
    """
    if not isinstance(model, nn.Module):
        raise TraceError(f"expected an nn.Module, got {type(model).__name__}; build_model(name).model makes one of a name")
    if isinstance(model, torch.jit.ScriptModule):
        name = getattr(model, "original_name", type(model).__name__)
        raise TraceError(f"{name} is a TorchScript module: its classes cannot be swapped; give the module it was scripted from")
    example = Example.of(example_input) if example_input is not None else example_for(model)
    copied, census, training = take_census(model, example)
    owners: dict[int, list[tuple[str, str]]] = {}
    for path, module in copied.named_modules():
        for attr, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((path, attr))
    sites: list[Site] = []
    skipped: list[Skipped] = []
    for (name, parameter), original in zip(copied.named_parameters(), model.parameters(), strict=True):
        if id(parameter) not in census.uses:
            raise TraceError(f"{name}: the forward pass puts another parameter in its place; nmfx masks parameters that stay")
        use = census.uses[id(parameter)]
        late = training.uses[id(parameter)] if training is not None else Use()
        places = owners[id(parameter)]
        found = _find(copied, name, parameter, use, late, places)
        if isinstance(found, tuple) and is_constant(original):
            found = "a frozen constant"
        if isinstance(found, str):
            if parameter.dim() > 1:
                skipped.append(Skipped(name, tuple(parameter.shape), found))
            continue
        seen, rows, derived = found
        sites.append(
            Site(
                name,
                seen.kind,
                tuple(parameter.shape),
                rows,
                macs=use.macs // example.batch,
                calls=seen.calls,
                bytes=parameter.numel() * parameter.element_size(),
                owners=tuple(places),
                conv_groups=seen.conv_groups,
                train_only=seen is late,
                derived=derived,
            )
        )
    for name, buffer in copied.named_buffers():
        if (seen := census.uses.get(id(buffer), Use())).read or seen.altered:
            skipped.append(Skipped(name, tuple(buffer.shape), "a buffer, not a parameter"))
    notes = () if training is not None else ("train mode does not run on the example input: auxiliary heads were not seen",)
    return Sites(tuple(sites), tuple(skipped), notes, type(model).__name__)


def is_constant(parameter: nn.Parameter) -> bool:
    """Whether this is a fixed filter (a blur, an edge detector, wavelets) rather than weights that are frozen for now.

    It does not train, and holds a few magnitudes only, other than zero; on the meta device nobody can say.
    """
    if parameter.requires_grad or parameter.is_meta or parameter.numel() == 0 or type(parameter) is not nn.Parameter:
        return False
    values = parameter.detach().flatten()
    for part in (values[:4096], values):
        found = part.abs().unique()
        if len(found[found != 0]) > max(1, min(16, len(part) // 4)):
            return False
    return True


def _find(
    model: nn.Module, name: str, parameter: nn.Parameter, use: Use, late: Use, owners: list[tuple[str, str]]
) -> tuple[Use, Rows, bool] | str:
    """The use that makes a site of a parameter, its rows, and whether what is masked is derived from it; or why it is none."""
    if any(isinstance(model.get_submodule(path), torch.jit.ScriptModule) for path, _ in owners):
        return "inside a TorchScript module: its class cannot be swapped"
    if parameter.is_complex():
        return "complex numbers: N:M keeps the largest of real ones"
    seen = use if use.read or use.altered else late
    if not seen.read and not seen.altered:
        return _not_read(name, parameter, use.operations + late.operations)
    if parameter.dim() < 2:
        return "a vector"
    if POSITION_TABLE.search(name.rpartition(".")[2]):
        return "a position table or token inside a matmul"
    if ADAPTER.search(name):
        return "an adapter: it is added to another weight, whose zeros it would fill"
    if use.mixed or late.mixed:
        return f"{LOST}: activations mix it into the kernel of a convolution"
    derived = bool(seen.altered)
    if (made_by := _made_by(use, late)) or (derived and not can_derive(model, owners)):
        return f"{LOST}: {made_by or seen.altered[0]} makes another weight of it first"
    parts: list[Part] = [part for part in seen.derived if part is not None] if derived else seen.read
    part = join_parts(parts)
    if part is not None and part.read is not None and seen.constant:  # projections of a learned query and of activations in one
        part = join_parts([*parts, *seen.constant]) or part
    if part is None:
        return "products sum over different dimensions of it"
    if part.read is not None:
        return f"only a part of it, {describe(part.read, tuple(parameter.shape))}, is read by a product"
    if part.length == 0 or parameter.numel() % (part.length * part.step):
        return "what a product sums over does not lie in even steps in it"
    return seen, (parameter.numel() // (part.length * part.step), part.length, part.step), derived


def _made_by(*uses: Use) -> str:
    """What makes another weight of a parameter where that one cannot be masked, as it is not the only one that is read."""
    altered = [(name, part) for use in uses for name, part in zip(use.altered, use.derived, strict=True)]
    only = not any(use.parts for use in uses)
    return next((name for name, part in altered if part is None or not only), "")


def _not_read(name: str, parameter: nn.Parameter, operations: list[str]) -> str:
    """Why a parameter that no product reads as a weight is no site."""
    if not operations:
        return "never read by the forward pass"
    if any(f"aten::{operation}" in PRODUCTS for operation in operations):
        return "data in a matmul (a learned query, or one factor of a weight)"
    for operation in operations:
        for word, reason in READ_AS.items():
            if word in operation:
                return reason
    if POSITION_TABLE.search(name.rpartition(".")[2]):
        return "a position table, expanded"
    return f"read by {', '.join(sorted(set(operations)))} only, not as a weight"
