"""What each storage holds of parameters, told operation by operation: activations, parameters, or what was made of them.

Storage identity says which parameter a tensor is a view of; operations on parameters alone (a cast, a permutation, a join, a
scale) pass on which entry lies where (see `places`), and whether zeros stay zeros.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from nmfx.models.places import Held, held_by, is_plain, lay, places_in, rebase
from nmfx.models.products import Operand

log = logging.getLogger(__name__)

# Elementwise operations that leave a zero zero: f(0) = 0, or 0 * x = 0.
_KEEPING = """mul div neg abs sign sqrt square pow relu leaky_relu tanh sin sinh asin atan erf gelu silu round trunc clamp
    hardtanh where masked_fill native_dropout _weight_norm_interface fake_quantize_per_tensor_affine_cachemask
    fake_quantize_per_channel_affine_cachemask clone lift_fresh alias detach _to_copy copy contiguous _unsafe_view"""
# Operations that put entries elsewhere; run on places instead of values, they say where.
_MOVING = """flip roll index index_select gather take embedding cat stack repeat constant_pad_nd tril triu select_scatter
    slice_scatter diag_embed rot90 pixel_shuffle pixel_unshuffle channel_shuffle block_diag masked_select repeat_interleave
    permute_copy transpose_copy view_copy expand_copy slice_copy unfold_copy"""
KEEPING, MOVING = frozenset(_KEEPING.split()), frozenset(_MOVING.split())
LOOKUPS = frozenset(("index", "index_select", "gather", "take", "embedding"))


def storage_of(tensor: Tensor) -> int:
    """What tells memory apart: views of one storage agree, on the meta device too."""
    return int(tensor.untyped_storage()._cdata)


def dense_tensors(tree: Any) -> list[Tensor]:
    """Dense tensors in the arguments of an operation; much faster than a general tree walk."""
    if isinstance(tree, Tensor):
        return [tree] if tree.layout == torch.strided else []
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, list | tuple):
        return []
    return [tensor for leaf in tree for tensor in dense_tensors(leaf)]


class Storages:
    """What the memory that a forward pass uses holds of parameters.

    Attributes:
        held: storage -> what it holds of parameters, as they are or derived.
        own: storages of the parameters and buffers themselves.
        buffers: ids of the tensors that are buffers.
        tainted: storages of activations.
        mixtures: storage -> parameters of the product that made it out of activations.
    """

    def __init__(self, parameters: Iterable[Tensor], buffers: Iterable[Tensor], inputs: Any) -> None:
        self.held: dict[int, Held] = {}
        self.buffers = {id(b) for b in buffers}
        for tensor in (*parameters, *buffers):
            self._hold(tensor, held_by(tensor))
        self.own = set(self.held)
        self.tainted = {storage_of(t) for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.layout == torch.strided}
        self.mixtures: dict[int, tuple[Tensor, ...]] = {}

    def _hold(self, tensor: Tensor, held: Held) -> None:
        """Note what the storage of `tensor` holds; several parameters may share one."""
        key = storage_of(tensor)
        if (before := self.held.get(key)) is not None and before.order is not None and held.order is not None:
            order = torch.where(held.order > 0, held.order + before.numel, before.order)
            held = replace(before, parameters=(*before.parameters, *held.parameters), order=order)
        self.held[key] = held

    def follow(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        inputs: list[Tensor],
        outputs: list[Tensor],
        weight: Operand | None,
        *,
        is_product: bool,
        by_layer: bool,
    ) -> None:
        """Mark what the outputs of an operation are: activations, values derived from parameters alone, or neither.

        Args:
            func: the operation, called with `args` and `kwargs`.
            inputs, outputs: dense tensors among its arguments, and those that it gave.
            weight, is_product: whether it sums over products, and the operand that it read as its weight, if any.
            by_layer: whether a layer function (`F.linear`, ...) is running.
        """
        ids = [storage_of(tensor) for tensor in inputs]
        active = [tensor for tensor, key in zip(inputs, ids, strict=True) if key in self.tainted]
        for out in outputs:
            key = storage_of(out)
            if key in ids or key in self.own:
                self._write(func, inputs, out, bool(active))
                continue
            made = self._factors(weight, out, by_layer) if is_product else self._derive(func, args, kwargs, inputs, out, active)
            self._forget(key)  # new memory: whatever stood at this address before is gone
            self.tainted.discard(key)
            if active:
                self.tainted.add(key)
                if weight is not None:
                    self.mixtures[key] = self.held[storage_of(weight.tensor)].parameters
            if made is not None and (not active or not is_product):
                self.held[key] = made

    def _forget(self, key: int) -> None:
        self.held.pop(key, None)
        self.mixtures.pop(key, None)

    def _write(self, func: Any, inputs: list[Tensor], out: Tensor, active: bool) -> None:
        """A view, or a write into memory that was there before."""
        key, name = storage_of(out), base_name(func)
        if not func._schema.is_mutable or key in self.own:
            if active and key not in self.own:
                self.tainted.add(key)
            return
        source = next((t for t in inputs[1:] if storage_of(t) in self.held and storage_of(t) != key), None)
        if active:
            self.tainted.add(key)
        if name == "copy" and source is not None and not active:
            self._copy_into(out, source)
        elif key in self.held and name not in KEEPING:
            if active:
                self._forget(key)
            else:
                self.held[key] = replace(self.held[key], altered=name)

    def _copy_into(self, out: Tensor, source: Tensor) -> None:
        """Entries of a parameter are written into other memory, as when a kernel is put together piece by piece."""
        key, held = storage_of(out), self.held[storage_of(source)]
        places, before = places_in(held, source), self.held.get(key)
        if places is None or out.is_complex() or held.altered or (before is not None and before.altered):
            self.held[key] = replace(held, altered=held.altered or "copy", order=None, itemsize=out.element_size())
            return
        parameters = tuple(dict.fromkeys((*(before.parameters if before else ()), *held.parameters)))
        size = out.untyped_storage().nbytes() // out.element_size()
        order = torch.zeros(size, dtype=torch.int64, device="cpu")
        if before is not None:
            order.copy_(before.order if before.order is not None else torch.arange(1, size + 1, device="cpu"))
        moved = rebase(places, held, parameters)
        order.as_strided(out.shape, out.stride(), out.storage_offset()).copy_(moved.expand(out.shape))
        beside = (*(before.beside if before else ()), *held.beside)
        self.held[key] = Held(parameters, out.element_size(), order, beside=beside, guessed=held.guessed)

    def _factors(self, weight: Operand | None, out: Tensor, by_layer: bool) -> Held | None:
        """What a product without activations has made: a weight out of two factors, or out of one and constants."""
        if weight is None:
            return None
        held, other = self.held[storage_of(weight.tensor)], self.held.get(storage_of(weight.other))
        both = [held] if other is None else [held, other]
        parameters = self._parameters(both)
        if not parameters:
            return None
        made = "data" if weight.is_kernel or by_layer or any(one.made == "data" for one in both) else "weight"
        return Held(parameters, out.element_size(), altered="a product", made=made)

    def _parameters(self, several: Iterable[Held]) -> tuple[Tensor, ...]:
        """All parameters that are in several storages, without buffers."""
        found = dict.fromkeys(p for held in several for p in (*held.parameters, *held.beside))
        return tuple(p for p in found if id(p) not in self.buffers)

    def _derive(
        self, func: Any, args: Any, kwargs: Any, inputs: list[Tensor], out: Tensor, active: list[Tensor]
    ) -> Held | None:
        """An operation that is no product: what its output holds of parameters, and in which order."""
        name, found = base_name(func), []
        for tensor in inputs:
            held = self.held.get(storage_of(tensor))
            if held is not None and any(p.dim() > 1 for p in held.parameters):
                found.append((tensor, held))
        found.sort(key=lambda pair: (id(pair[1].parameters[0]) in self.buffers, bool(pair[1].altered)))
        if name.startswith(("new_", "empty")) or name.endswith("_like"):
            return None  # of its shape only
        if not found or (active and not self._is_modulation(name, found[0][0], active)):
            return None
        if name in MOVING:
            return self._move(func, args, kwargs, out, guessed=bool(active))
        tensor, held = next((pair for pair in found if pair[0].shape == out.shape), found[0])
        keeps = name in KEEPING and self._keeps(name, tensor, args, inputs)
        if keeps and not held.made:
            lost = self._parameters(h for _, h in found if h is not held and h.altered)
            beside = dict.fromkeys((*held.beside, *(p for p in lost if all(p is not own for own in held.parameters))))
            return replace(self._copy(tensor, held, out), beside=tuple(beside))
        if (active and not keeps) or not (out.is_floating_point() or out.is_complex() or out.dtype == torch.bool):
            return None
        made = {h.made for _, h in found if h.made}
        parameters = self._parameters(h for _, h in found) if made else held.parameters
        if not parameters or id(held.parameters[0]) in self.buffers:
            return None
        if made:
            kind = "data" if "data" in made else "weight"
            return Held(parameters, out.element_size(), altered=held.altered if keeps else name, made=kind)
        if tensor.numel() != out.numel():
            return Held(parameters, out.element_size(), altered=held.altered or name, beside=held.beside)
        return replace(self._copy(tensor, held, out), altered=held.altered or name)

    def _is_modulation(self, name: str, tensor: Tensor, active: list[Tensor]) -> bool:
        """Whether activations scale or choose parts of a weight, rather than the weight scaling them."""
        if storage_of(tensor) in self.tainted:
            return True
        if name in LOOKUPS and name != "embedding":
            return not any(t.is_floating_point() for t in active)
        return name in ("mul", "div") and tensor.dim() > 1 and all(_spreads(t, tensor) for t in active)

    def _keeps(self, name: str, tensor: Tensor, args: Any, inputs: list[Tensor]) -> bool:
        """Whether this call of an operation of `KEEPING` leaves zeros zeros."""
        if name == "div":
            return tensor is args[0]
        if name == "pow":
            return tensor is args[0] and not isinstance(args[1], Tensor) and args[1] > 0
        if name in ("clamp", "hardtanh"):
            low, high = (*args[1:], None, None)[:2]
            return all(not isinstance(v, Tensor) for v in (low, high)) and (low or 0) <= 0 <= (high or 0)
        if name == "masked_fill":
            return not isinstance(args[2], Tensor) and args[2] == 0
        if name == "where":
            return all(t is args[0] or t is tensor or t.numel() == 1 for t in inputs)
        return True

    def _copy(self, tensor: Tensor, held: Held, out: Tensor) -> Held:
        if is_plain(held, tensor) and out.is_contiguous() and out.numel() == held.numel:
            return replace(held, itemsize=out.element_size(), order=None)
        places = places_in(held, tensor)
        if places is None or tensor.is_complex():
            return replace(held, altered="a complex copy", order=None)
        if out.numel() != tensor.numel() or out.shape != tensor.shape:
            places = places.reshape(out.shape) if out.numel() == places.numel() else places.expand(out.shape)
        return lay(held, out, places)

    def _move(self, func: Any, args: Any, kwargs: Any, out: Tensor, *, guessed: bool) -> Held | None:
        """Run the operation on places in place of values; `guessed` if activations choose what is moved."""
        parts = {storage_of(t): self.held[storage_of(t)] for t in dense_tensors((args, kwargs)) if storage_of(t) in self.held}
        parameters = tuple(dict.fromkeys(p for held in parts.values() for p in held.parameters))
        altered = next((held.altered for held in parts.values() if held.altered), "")
        made, beside = {held.made for held in parts.values() if held.made}, [p for h in parts.values() for p in h.beside]
        sizes = _indexed(base_name(func), args)
        guessed = guessed or any(held.guessed for held in parts.values())

        def placed(leaf: Any) -> Any:
            nonlocal guessed
            if not isinstance(leaf, Tensor):
                return leaf
            held = parts.get(storage_of(leaf))
            if held is not None and leaf.dtype != torch.bool:
                places = places_in(held, leaf)
                if places is None or leaf.is_complex():
                    raise ValueError("it holds complex numbers")
                return rebase(places, held, parameters)
            if leaf.is_floating_point():
                return torch.zeros(leaf.shape, dtype=torch.int64, device="cpu")
            if not leaf.is_meta:
                return leaf.cpu()
            # Any index will do: it moves what lies beside the indexed dimension as a whole.
            size, guessed = sizes[id(leaf)], True
            return torch.randperm(size).repeat(-(-leaf.numel() // size))[: leaf.numel()].view(leaf.shape)

        try:
            if altered:
                raise ValueError("it holds other values")
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                args, kwargs = tree_map(placed, (args, kwargs))
                places = func(*args, **kwargs)
        except Exception as error:
            log.debug("%s cannot be followed: %r", func, error)
            if not altered and out.numel() != sum(p.numel() for p in parameters):
                return None
            kind = "data" if "data" in made else next(iter(made), "")
            return Held(parameters, out.element_size(), altered=altered or base_name(func), made=kind, beside=tuple(beside))
        return replace(lay(Held(parameters, out.element_size(), beside=tuple(beside)), out, places), guessed=guessed)


def _indexed(name: str, args: Any) -> dict[int, int]:
    """Size of the dimension that each index of a look-up runs over, by its id."""
    if name == "index":
        return {id(index): args[0].shape[dim] for dim, index in enumerate(args[1]) if index is not None}
    if name in ("index_select", "gather"):
        return {id(args[2]): args[0].shape[args[1]]}
    return {id(args[1]): len(args[0])} if name == "embedding" else {}


def base_name(func: Any) -> str:
    """Name of an operation without its library and the underscore of writing in place."""
    return str(func._schema.name).rpartition("::")[2].rstrip("_")


def _spreads(active: Tensor, weight: Tensor) -> bool:
    """Whether a factor is spread over a dimension of the weight, as a scale of input channels is over output channels."""
    shape = (1,) * (weight.dim() - active.dim()) + tuple(active.shape)
    return any(mine == 1 < size for mine, size in zip(shape[-weight.dim() :], weight.shape, strict=True))
