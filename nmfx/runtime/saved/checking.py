"""What a compiled file may ask of operators and layers: arguments of their kinds, and sizes that are no burden."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn

from nmfx.errors import CheckpointError
from nmfx.runtime.checks import check_bias, check_pictures, check_residual, check_window, expect
from nmfx.runtime.layers import DenseConv2d, KernelLayer
from nmfx.runtime.operators import OPERATORS
from nmfx.runtime.saved.form import ENUMERATIONS

MOST_WEIGHTS = 1 << 28  # of a sparse site, its zeros counted: a chain lays it out anew
MOST_TAPS, MOST_PADDED = 1 << 12, 1 << 22  # weights of a window, pixels of a picture with all that windows read around it


def check_site(layer: nn.Module, inputs: Sequence[fx.Node]) -> None:
    """Check a layer for what its nodes give, as far as that is known.

    Raises:
        RuntimeError: it cannot compute that.
    """
    values = [node.meta.get("val") for node in inputs]
    x, residual = values[0], values[1] if len(values) > 1 else None
    if isinstance(layer, KernelLayer):
        operator = OPERATORS[layer.operator]
        expect(len(inputs) == 1 or "residual" in operator.arguments, "no residual")
        if not isinstance(x, Tensor):
            layer.lanes = None
            return
        given = SimpleNamespace(**operator.named(layer.arguments(x, residual)))
        assert operator.sizes is not None
        operator.sizes(given, False)  # the kernel looks at every column when it is first called
        if "pointers" in operator.arguments:
            out = given.out_channels if "out_channels" in operator.arguments else given.out_features
            expect(out * given.width <= MOST_WEIGHTS, f"at most {MOST_WEIGHTS:,} weights")
            ends, rises = (int(given.pointers[0]), int(given.pointers[-1])), bool((given.pointers.diff() >= 0).all())
            expect(rises and ends == (0, len(given.values)), "pointers that rise from 0 to the number of values")
        if "stride" in operator.arguments:
            kernel = given.kernel if hasattr(given, "kernel") else given.weight.shape[2:]
            check_extent(x, kernel, given.padding, given.dilation)
    elif isinstance(layer, DenseConv2d):
        expect(isinstance(x, Tensor), "pictures of known size")
        stride, padding, dilation = layer.geometry
        weight: Tensor = layer.weight  # type: ignore[assignment]
        check_pictures(x)  # type: ignore[arg-type]
        out = check_window(x, weight.shape[2:], stride, padding, dilation)  # type: ignore[arg-type]
        expect(x.shape[1] == weight.shape[1] * layer.groups, f"pictures of the weight's channels, got {x.shape[1]}")  # type: ignore[union-attr]
        check_bias(layer.bias, len(weight))  # type: ignore[arg-type]
        check_residual(residual, (x.shape[0], len(weight), *out))  # type: ignore[union-attr]
    else:
        expect(len(inputs) == 1, "no residual")


def check_extent(x: Tensor, kernel: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> None:
    """Windows that are laid out for lanes are of a size that is no burden."""
    expect(math.prod(kernel) <= MOST_TAPS, f"windows of at most {MOST_TAPS:,} weights")
    if math.prod(x.shape[2:]) > MOST_PADDED:
        return  # too large for lanes
    sides = zip(x.shape[2:], kernel, padding[:2], padding[-2:], dilation, strict=True)
    padded = math.prod(size + first + last + d * (k - 1) for size, k, first, last, d in sides)
    expect(padded <= MOST_PADDED, f"windows that read {MOST_PADDED:,} pixels at most")


def check_arguments(name: str, operator: torch._ops.OpOverload | None, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise unless arguments are of the kinds that an operator takes; without one, two nodes or numbers."""
    if operator is None:
        if len(args) != 2 or kwargs or not all(isinstance(each, fx.Node) or type(each) is int for each in args):
            raise CheckpointError(f"{name}: expected two nodes or whole numbers")
        return
    schema = operator._schema.arguments
    positions = [one.name for one in schema if not one.kwarg_only]
    given: dict[str, Any] = {**dict(zip(positions, args, strict=False)), **kwargs}
    if len(given) != len(args) + len(kwargs) or given.keys() - {one.name for one in schema}:
        raise CheckpointError(f"{name}: expected arguments {', '.join(one.name for one in schema)}")
    for one in schema:
        if one.name not in given:
            if not one.has_default_value():
                raise CheckpointError(f"{name}: no argument {one.name}")
        elif not fits(given[one.name], str(one.real_type)) or (one.name == "dropout_p" and given[one.name] != 0.0):
            raise CheckpointError(f"{name}: {one.name}: expected {one.real_type}, got {given[one.name]!r}")


def fits(value: Any, kind: str) -> bool:
    """Whether an argument is of a kind of a schema; a node may be of any, as PyTorch checks what it gives."""
    if kind.startswith("Optional["):
        return value is None or fits(value, kind[9:-1])
    if kind.startswith("List["):
        inner = kind[5:-1]
        several = value if isinstance(value, list) else [value] if inner in ("int", "SymInt", "float") else [None, value]
        return all(fits(each, inner) for each in several)
    if isinstance(value, fx.Node):
        return kind in ("Tensor", "int", "SymInt", "number", "float", "bool")
    if kind == "Tensor":
        return isinstance(value, Tensor | int | float)  # PyTorch makes tensors of numbers
    if kind in ENUMERATIONS:
        return any(value is one or value == one for one in ENUMERATIONS[kind].values() if type(one) is type(value))
    kinds: dict[str, Any] = {
        "int": int,
        "SymInt": int,
        "float": (int, float),
        "number": (bool, int, float),
        "bool": bool,
        "str": str,
    }
    return kind in kinds and isinstance(value, kinds[kind]) and (kind in ("bool", "number") or not isinstance(value, bool))
