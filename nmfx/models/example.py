"""An input that fits a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from nmfx.masking.owner import plain_class


@dataclass(frozen=True)
class Example:
    """The arguments of one forward pass; only shapes and dtypes matter."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(value: Any) -> Example:
        """A tensor or list is one argument, a tuple the positional ones, a dict the keyword ones."""
        if isinstance(value, Example):
            return value
        if isinstance(value, dict):
            return Example((), value)
        return Example(value if isinstance(value, tuple) else (value,))

    @property
    def batch(self) -> int:
        """Samples in the example: the first tensor's first dimension, or the length of a list of pictures."""
        first = next(iter((*self.args, *self.kwargs.values())), None)
        if isinstance(first, list):
            return max(1, len(first))
        tensor = next((t for t in tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor) and t.dim()), None)
        return max(1, tensor.shape[0]) if tensor is not None else 1

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> Example:
        """This example on a device, its floating-point tensors in `dtype`."""

        def move(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return leaf.detach().to(device, dtype if leaf.is_floating_point() else None)

        return Example(*tree_map(move, (self.args, self.kwargs)))

    def filled(self, fill: Callable[[Tensor], Tensor]) -> Example:
        """This example with each tensor replaced by ``fill(tensor)``."""
        return Example(*tree_map(lambda leaf: fill(leaf) if isinstance(leaf, Tensor) else leaf, (self.args, self.kwargs)))

    def doubled(self) -> Example:
        """Every sample twice: batch normalisation in train mode needs more than one value a channel."""

        def twice(leaf: Any) -> Any:
            if isinstance(leaf, list):
                return leaf + leaf
            return torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.dim() else leaf

        is_list = lambda leaf: isinstance(leaf, list)  # noqa: E731
        return Example(*tree_map(twice, (self.args, self.kwargs), is_leaf=is_list))

    def __str__(self) -> str:
        shapes = ["x".join(map(str, t.shape)) for t in tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor)]
        return f"an input of {', '.join(shapes) or 'no tensors'}"


VIDEO = {"resnet": (16, 112, 112), "mvit": (16, 224, 224), "swin_transformer": (16, 224, 224), "s3d": (16, 224, 224)}


def example_for(model: nn.Module) -> Example:
    """An input as the model's own configuration describes it; 1x3x224x224 when it has none.

    Reads ``input_size`` (an attribute of the model, without the batch), timm's ``pretrained_cfg`` and ``patch_embed``,
    torchvision's ``image_size`` and the families of torchvision that take videos, pairs of pictures or lists of them.
    """
    defined = plain_class(model).__module__
    if size := getattr(model, "input_size", None):
        return Example((torch.empty(1, *size),))
    if config := getattr(model, "pretrained_cfg", None):
        channels, height, width = config.get("input_size", (3, 224, 224))
        height, width = _patch_size(model) or (height, width)
        first = next((p for n, p in model.named_parameters() if p.dim() == 4 and n.endswith("weight")), None)
        if first is not None and config.get("first_conv") and first.shape[1] != channels:
            channels = first.shape[1] if first.shape[1] <= 16 else channels
        return Example((torch.empty(1, channels, height, width),))
    if defined.startswith("torchvision.models.video"):
        return Example((torch.empty(1, 3, *VIDEO.get(defined.rpartition(".")[2], (16, 224, 224))),))
    if defined.startswith("torchvision.models.optical_flow"):
        return Example((torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128)))
    if defined.startswith("torchvision.models.detection"):
        return Example(([torch.rand(3, 320, 320)],))
    side = 299 if defined.endswith(".inception") else getattr(model, "image_size", 224)
    return Example((torch.empty(1, 3, side, side),))


def _patch_size(model: nn.Module) -> tuple[int, int] | None:
    """The picture size a timm transformer was made for, which its pretrained_cfg does not follow."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return (size[0], size[1]) if isinstance(size, tuple) and len(size) == 2 and all(size) else None
