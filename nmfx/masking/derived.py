"""Weights that their module makes anew in its own forward pass (weight standardisation): what is convolved is masked.

A mask on the parameter would be lost, as its zeros are standardised away. So the module's forward pass runs as it is, and the
weight that it hands to its convolution or linear is replaced on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

READERS = frozenset(
    (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.linear)
)  # all take the weight second


class Substitute(TorchFunctionMode):
    """Replaces the weight of one shape that a convolution or a linear reads by ``change(weight)``."""

    def __init__(self, shape: torch.Size, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.shape, self.change = shape, change

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in READERS:
            weight = kwargs["weight"] if "weight" in kwargs else args[1]
            if isinstance(weight, Tensor) and weight.shape == self.shape:
                new = self.change(weight)
                if "weight" in kwargs:
                    kwargs["weight"] = new
                else:
                    args = (args[0], new, *args[2:])
        return func(*args, **kwargs)


class _Seen(Exception):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight


def _stop(weight: Tensor) -> Tensor:
    raise _Seen(weight)


def _input_for(module: nn.Module) -> Tensor:
    weight = module._parameters["weight"]
    assert weight is not None
    if isinstance(module, _ConvNd):
        side = [3 * d * (k - 1) + 5 for k, d in zip(module.kernel_size, module.dilation, strict=True)]
        return torch.randn((1, module.in_channels, *side), device=weight.device, dtype=weight.dtype)
    return torch.randn((1, int(module.in_features)), device=weight.device, dtype=weight.dtype)  # type: ignore[arg-type]


def derive(module: nn.Module, cls: type[nn.Module]) -> Tensor:
    """The weight that the forward pass of `cls` makes of ``module.weight``."""
    weight = module._parameters["weight"]
    assert weight is not None
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            with Substitute(weight.shape, _stop):
                cls.forward(module, _input_for(module))
        except _Seen as seen:
            return seen.weight
    raise ValueError(f"{cls.__name__} hands no weight of shape {tuple(weight.shape)} to a convolution or linear")


def plain_twin(module: nn.Module, cls: type[nn.Module]) -> type[nn.Module]:
    """The class that computes the same with a given weight: torch's own, or timm's with padding that follows the input."""
    if getattr(module, "same_pad", False) and cls.__module__.startswith("timm."):
        from timm.layers import Conv2dSame

        return cast(type[nn.Module], Conv2dSame)
    return next(base for base in cls.__mro__ if base.__module__.startswith("torch.nn.modules."))


def is_derivable(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether ``module.weight`` may be masked where it is read: a convolution or linear with a forward pass of its own."""
    if not isinstance(module, _ConvNd | nn.Linear) or cls.__module__.startswith("torch.nn.modules."):
        return False
    if (weight := module._parameters.get("weight")) is None:
        return False
    try:
        return derive(module, cls).shape == weight.shape
    except Exception:  # whatever its forward pass may want
        return False


@torch.no_grad()
def fold(module: nn.Module, cls: type[nn.Module], value: Tensor) -> float:
    """Give `module` its plain twin's class and the weight `value`, in place.

    Returns:
        How far its output on random numbers is from what `cls` computes with that weight, relative to the largest.
    """
    weight, twin = module._parameters["weight"], plain_twin(module, cls)
    assert weight is not None
    difference = 0.0
    with torch.random.fork_rng(devices=[]):
        x = _input_for(module)
        if not x.is_meta:
            with Substitute(weight.shape, lambda _: value):
                expected = cls.forward(module, x)
    module.__class__ = twin
    weight.copy_(value)
    for name in set(module._parameters) - {"weight", "bias"}:  # gains are folded in
        del module._parameters[name]
    if not x.is_meta:
        found = twin.forward(module, x)
        scale = max(float(expected.abs().max()), 1e-12)
        difference = float((found - expected).abs().max()) / scale if found.shape == expected.shape else float("inf")
    return difference
