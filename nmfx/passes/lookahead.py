"""What one forward pass tells before layers are corrected: what comes after each product, and how much memory waits there.

A product whose output is added to a shortcut can make up for what the shortcut lost: it should give the dense network's sum,
not only its own part of it. A batch norm after it takes up a constant for each channel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from nmfx.models.storages import dense_tensors, storage_of

SUMS = ("aten::add", "aten::add_")


@dataclass
class Follower:
    """What comes after one product.

    Attributes:
        norm: key of the batch norm that reads its output first, or None.
        scale: weight (or None), running variance and epsilon of that norm; empty without one.
        shortcut: the operation, counted from 0, that gave what is added to it next, or None.
    """

    norm: Any = None
    scale: tuple[Any, ...] = ()
    shortcut: int | None = None


@dataclass(frozen=True)
class _Output:
    """The output of a product, which nothing has read yet: key and index of the product, and the output's shape."""

    key: Any
    index: int
    shape: torch.Size


class Lookahead(TorchDispatchMode):
    """Watches one forward pass.

    Args:
        wanted: as `lockstep.Run` takes it; its tags have a ``key``, and a ``product`` where they are no batch norms.
        norms: names of operations that are batch norms, and where the running mean is among their arguments.

    Attributes:
        followers: by the key of each product; the first call counts.
        live: bytes of activations in memory at each wanted operation, its output included.
    """

    def __init__(self, wanted: Callable[[str, Any], Any], norms: dict[str, int]) -> None:
        super().__init__()
        self.wanted, self.norms = wanted, norms
        self.followers: dict[Any, Follower] = {}
        self.live: list[int] = []
        self._index = 0
        self._open: dict[int, _Output] = {}  # by storage
        self._made: dict[int, tuple[int, int]] = {}  # storage -> the operation that wrote it last, and how many entries
        self._memory: dict[int, tuple[StorageWeakRef, int]] = {}  # storage -> itself and its bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        index, name, tag = self._index, func._schema.name, self.wanted(func._schema.name, args)
        self._index += 1
        inputs = [storage_of(t) for t in dense_tensors((args, kwargs or {}))]
        out = func(*args, **(kwargs or {}))
        self._forget()
        outputs = dense_tensors(out)
        if outputs and storage_of(outputs[0]) in inputs and not func._schema.is_mutable:
            return out  # a view
        self._read(name, args, tag, inputs, outputs)
        for place, tensor in enumerate(outputs):
            key = storage_of(tensor)
            self._made.pop(key, None)
            if not place:  # `Run.kept` has the first
                self._made[key] = index, tensor.numel()
            if key not in inputs:
                self._memory[key] = StorageWeakRef(tensor.untyped_storage()), tensor.untyped_storage().nbytes()
        if tag is not None:
            self.live.append(sum(size for _, size in self._memory.values()))
            if tag.product is not None and outputs and tag.key not in self.followers:
                self.followers[tag.key] = Follower()
                self._open[storage_of(outputs[0])] = _Output(tag.key, index, outputs[0].shape)
        return out

    def _forget(self) -> None:
        """Drop what has left memory, whose addresses are used again."""
        for key in [key for key, (storage, _) in self._memory.items() if storage.expired()]:
            for table in (self._memory, self._made, self._open):
                table.pop(key, None)  # type: ignore[attr-defined]

    def _read(self, name: str, args: Any, tag: Any, inputs: list[int], outputs: list[Tensor]) -> None:
        """See what an operation does with outputs of products that nothing has read before."""
        for storage in dict.fromkeys(inputs):
            if (one := self._open.pop(storage, None)) is None:
                continue
            follower = self.followers[one.key]
            if name in self.norms and tag is not None and follower.norm is None and storage_of(args[0]) == storage:
                follower.norm, follower.scale = tag.key, (args[1], args[self.norms[name] + 1], args[-1])
                self._open[storage_of(outputs[0])] = one
            elif name in SUMS and len(args) == 2 and all(isinstance(t, Tensor) for t in args):
                mine, other = args if storage_of(args[0]) == storage else (args[1], args[0])
                made = self._made.get(storage_of(other))
                alike = mine.shape == other.shape and mine.numel() == one.shape.numel()
                straight = mine.shape == one.shape or (follower.norm is None and mine.is_contiguous() and other.is_contiguous())
                if made is not None and made[0] < one.index and made[1] == other.numel() and alike and straight:
                    follower.shortcut = made[0]


def look_ahead(model: nn.Module, x: Any, wanted: Callable[[str, Any], Any], norms: dict[str, int]) -> Lookahead:
    """Run `model` on `x` (a tensor, a tuple of arguments, or a dict of them by name) without gradients; see `Lookahead`."""
    seen = Lookahead(wanted, norms)
    with torch.no_grad(), seen:
        model(**x) if isinstance(x, dict) else model(*(x if isinstance(x, tuple | list) else (x,)))
    return seen
