"""A network to stop in: which operations of its forward passes read a weight or are a batch norm, and what follows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nmfx.masking.copies import deep_copy
from nmfx.masking.owner import masks_derived, unmask
from nmfx.masking.weight import MaskSpec
from nmfx.models.storages import LOOKUPS, storage_of
from nmfx.passes.lockstep import Run, sharing_copy
from nmfx.passes.lookahead import Follower, look_ahead
from nmfx.passes.samples import Product, product_of

NORMS = {  # operations that normalise by running statistics, and where the running mean is among their arguments
    "aten::native_batch_norm": 3,
    "aten::_native_batch_norm_legit_no_training": 3,
    "aten::cudnn_batch_norm": 3,
    "aten::miopen_batch_norm": 3,
}


@dataclass(frozen=True)
class Stop:
    """Where a run waits: at a product that reads a weight, or at a batch norm.

    Attributes:
        key: tells one from another; the same in both networks.
        product: of a weight.
        mean, variance, x: of a batch norm, and its input.
    """

    key: tuple[Any, ...]
    product: Product | None = None
    mean: Tensor | None = None
    variance: Tensor | None = None
    x: Tensor | None = None


class Network:
    """A copy to run, and its weights by name: without masks, but for those on what a module makes of its weight.

    Args:
        keep_derived: whether those stay.
    """

    def __init__(self, model: nn.Module, specs: dict[str, MaskSpec], *, keep_derived: bool = False) -> None:
        self.model = deep_copy(model).eval()
        for module in self.model.modules():
            if not (keep_derived and masks_derived(module)):
                unmask(module, keep_masked=False)
        self.specs = specs
        self.weights: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.dim() > 1 and parameter.is_floating_point():
                parameter.data = parameter.data.contiguous()
                self.weights[name] = parameter.data
        self._names = {storage_of(weight): name for name, weight in self.weights.items()}
        self.biases = {name: p.data for name, p in self.model.named_parameters() if p.dim() == 1 and p.is_floating_point()}
        self._bias_storages = {storage_of(bias) for bias in self.biases.values()}
        self.followers: dict[Any, Follower] = {}
        self.keep, self.live = set[int](), list[int]()
        self.looked_up = set[str]()
        self._norms = {storage_of(buffer): name for name, buffer in self.model.named_buffers()}

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Shapes of all weights."""
        return {name: weight.shape for name, weight in self.weights.items()}

    @property
    def values(self) -> dict[str, Tensor]:
        """All that a correction changes: weights, biases, and statistics of batch norms."""
        norms = {n: b for n, b in self.model.named_buffers() if n.rpartition(".")[2] in ("running_mean", "running_var")}
        return self.weights | self.biases | norms

    def look_ahead(self, x: Any) -> None:
        """See in one forward pass what follows each product, which results runs have to keep for it, and how much they hold."""
        seen = look_ahead(sharing_copy(self.model), x, self.wanted, NORMS)
        self.followers, self.live = seen.followers, seen.live
        self.keep |= {one.shortcut for one in self.followers.values() if one.shortcut is not None}

    def take_shortcut(self, run: Run, key: Any) -> Tensor | None:
        """What one run has kept of the shortcut that the product of `key` is added to; it is kept no longer."""
        follower = self.followers.get(key)
        return None if follower is None or follower.shortcut is None else run.kept.pop(follower.shortcut, None)

    def own_bias(self, product: Product) -> Tensor | None:
        """The parameter that a product adds, one number an output channel; None where it adds none of its own."""
        bias = product.bias
        if bias is None or bias.dim() != 1 or len(bias) != product.groups * product.rows:
            return None
        return bias if storage_of(bias) in self._bias_storages else None

    def moves(self, stop: Stop) -> bool:
        """Whether a product's outputs may move by a constant for each channel: a batch norm or a bias takes it up."""
        follower = self.followers.get(stop.key)
        if follower is not None and follower.norm is not None:
            return True
        return stop.product is not None and self.own_bias(stop.product) is not None

    def wanted(self, name: str, args: Any) -> Stop | None:
        """What `Run` asks of every operation."""
        if (place := NORMS.get(name)) is not None:
            mean, variance = args[place], args[place + 1]
            if isinstance(mean, Tensor) and storage_of(mean) in self._norms and args[place + 2] is not True:
                return Stop((self._norms[storage_of(mean)],), None, mean, variance, args[0])
            return None
        if name.removeprefix("aten::") in LOOKUPS and isinstance(args[0], Tensor) and storage_of(args[0]) in self._names:
            self.looked_up.add(self._names[storage_of(args[0])])
        product = product_of(name, args, lambda t: storage_of(t) in self._names)
        if product is None:
            return None
        weight = product.weight
        part = (weight.storage_offset(), tuple(weight.shape), weight.stride())
        return Stop((self._names[storage_of(weight)], *part), product)
