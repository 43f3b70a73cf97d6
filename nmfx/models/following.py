"""Follows parameters through a forward pass: every one is followed through a forward pass into the products that read it.

A dispatch mode sees each aten operation of one eval and one train forward. Storage identity says which parameter an operand
is a view of; operations on parameters alone (a cast, a permutation, a join, a scale) pass on which entry lies where (see
`places`), and whether zeros stay zeros. No module type is asked for anything, so functional calls, attention projections,
LSTMs and weights inside fx leaves are found alike.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from nmfx.masking.derived import READERS
from nmfx.models.places import Held, Part, held_by, is_plain, lay, parts_of, places_in, rebase
from nmfx.models.products import PRODUCTS, Operand

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
LAYERS = dict.fromkeys(READERS, 1) | {F.bilinear: 2, F.multi_head_attention_forward: 3}  # and how many inputs come first
INPUTS = frozenset(("input", "input1", "input2", "query", "key", "value"))
LOOKUPS = frozenset(("index", "index_select", "gather", "take", "embedding"))


@dataclass
class Use:
    """What one parameter was seen doing.

    Attributes:
        parts: what each product with activations read, and `costs` its MACs; `constant` and `constant_costs` are those of
            products with other parameters or constants, which count only if there are no others.
        altered: the operations that made another weight of it before a product read that one.
        derived: parts of products that read the altered weight, place for place, inside the forward pass of its own module.
        mixed: activations were mixed into a convolution's kernel from it.
        guessed: an index without values (on the meta device) chose what a product read.
    """

    kind: str = ""
    conv_groups: int = 1
    parts: list[Part] = field(default_factory=list)
    costs: list[int] = field(default_factory=list)
    constant: list[Part] = field(default_factory=list)
    constant_costs: list[int] = field(default_factory=list)
    altered: list[str] = field(default_factory=list)
    derived: list[Part | None] = field(default_factory=list)
    mixed: bool = False
    guessed: bool = False
    operations: list[str] = field(default_factory=list)

    @property
    def read(self) -> list[Part]:
        """Parts of the products that count."""
        return self.parts or self.constant

    @property
    def counted(self) -> list[int]:
        """MACs of each product that counts: with activations, and those with constants that read the same rows."""
        if not self.costs:
            return self.constant_costs
        rows = {(part.length, part.step) for part in self.parts}
        alike = zip(self.constant, self.constant_costs, strict=True)
        return self.costs + [macs for part, macs in alike if macs and (part.length, part.step) in rows]

    @property
    def macs(self) -> int:
        """Multiply-adds of the products that count, of the whole batch."""
        return sum(self.counted)

    @property
    def calls(self) -> int:
        """How many products count."""
        return len(self.counted)


def storage_of(tensor: Tensor) -> int:
    """What tells memory apart: views of one storage agree, on the meta device too."""
    return int(tensor.untyped_storage()._cdata)


class Layers(TorchFunctionMode):
    """Knows what the layer function that runs was given as its weights, which its products do not tell from data.

    Attributes:
        weights: their storages; None outside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights: set[int] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in LAYERS:
            return func(*args, **kwargs)
        given = [args[LAYERS[func] :], [value for name, value in kwargs.items() if name not in INPUTS]]
        before, self.weights = self.weights, {storage_of(tensor) for tensor in _tensors(given)}
        try:
            return func(*args, **kwargs)
        finally:
            self.weights = before


class Census(TorchDispatchMode):
    """Records how a forward pass uses the parameters of a model.

    Attributes:
        uses: what was seen, by the id of the parameter (or buffer).
        held: storage -> what it holds of parameters, as they are or derived.
        tainted: storages of activations.
        mixtures: storage -> parameters of the product that made it out of activations.
        plain: ids of parameters that products read in their own memory.
        running: modules whose forward pass is under way, the innermost last (see `watch`).
    """

    def __init__(self, parameters: Iterable[Tensor], inputs: Any, buffers: Iterable[Tensor] = ()) -> None:
        super().__init__()
        parameters, buffers = list(parameters), [b for b in buffers if b.dim() > 1 and b.is_floating_point()]
        self.uses = {id(t): Use() for t in (*parameters, *buffers)}
        self.buffers = {id(b) for b in buffers}
        self.held: dict[int, Held] = {}
        for tensor in (*parameters, *buffers):
            self.hold(tensor, held_by(tensor))
        self.own = set(self.held)
        self.tainted = {storage_of(t) for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.layout == torch.strided}
        self.mixtures: dict[int, tuple[Tensor, ...]] = {}
        self.running: list[nn.Module] = []
        self.plain: set[int] = set()
        self.layers = Layers()

    def __enter__(self) -> Any:
        self.layers.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.layers.__exit__(*error)

    def hold(self, tensor: Tensor, held: Held) -> None:
        """Note what the storage of `tensor` holds; several parameters may share one."""
        key = storage_of(tensor)
        if (before := self.held.get(key)) is not None and before.order is not None and held.order is not None:
            order = torch.where(held.order > 0, held.order + before.numel, before.order)
            held = replace(before, parameters=(*before.parameters, *held.parameters), order=order)
        self.held[key] = held

    def watch(self, model: nn.Module) -> None:
        """Note which modules are running; `model` is a throw-away copy."""
        for module in model.modules():
            if not isinstance(module, torch.jit.ScriptModule):
                module.register_forward_pre_hook(self._enter)
                module.register_forward_hook(self._leave, always_call=True)

    def _enter(self, module: nn.Module, _: Any) -> None:
        self.running.append(module)

    def _leave(self, *_: Any) -> None:
        self.running.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name, inputs, outputs = func._schema.name, _tensors((args, kwargs)), _tensors(out)
        operands = PRODUCTS[name](args, outputs[0]) if name in PRODUCTS else []
        weight = min((o for o in operands if storage_of(o.tensor) in self.held), key=self._doubt, default=None)
        if weight is not None:  # the other operand of a product of two parameters is data (a learned query)
            self._record_weight(weight)
        elif operands and operands[0].is_kernel:
            for parameter in self.mixtures.get(storage_of(operands[0].tensor), ()):
                self.uses[id(parameter)].mixed = True
        self._record_reads(name, [t for t in inputs if weight is None or t is not weight.tensor], outputs)
        self._follow(func, args, kwargs, inputs, outputs, weight, is_product=bool(operands))
        return out

    def _doubt(self, operand: Operand) -> tuple[bool, bool, bool]:
        """What a layer takes as its weight comes first, parameters before buffers, and what was not altered before what was."""
        held, given = self.held[storage_of(operand.tensor)], self.layers.weights or ()
        return storage_of(operand.tensor) not in given, id(held.parameters[0]) in self.buffers, bool(held.altered)

    def _is_weight(self, held: Held, operand: Operand) -> bool:
        """Whether what a product has made is the weight of this one, rather than data (a learned query in an attention)."""
        if operand.is_kernel or storage_of(operand.tensor) in (self.layers.weights or ()):
            return True
        return held.made == "weight" and storage_of(operand.other) in self.tainted

    def _lose(self, parameters: Iterable[Tensor], name: str) -> None:
        """A product reads what is made of parameters and does not receive their zeros."""
        for parameter in parameters:
            use = self.uses[id(parameter)]
            use.altered.append(name)
            use.derived.append(None)

    def _record_weight(self, operand: Operand) -> None:
        held = self.held[storage_of(operand.tensor)]
        self._lose(held.beside, "mul")
        if held.altered:
            self._record_altered(held, operand)
        else:
            self._record_parts(held, operand)

    def _record_parts(self, held: Held, operand: Operand) -> None:
        """A product reads entries of parameters as they are."""
        active = storage_of(operand.other) in self.tainted
        if storage_of(operand.tensor) in self.own:
            self.plain |= {id(parameter) for parameter in held.parameters}
        for index, part in parts_of(held, operand).items():
            use, parameter = self.uses[id(held.parameters[index])], held.parameters[index]
            if not use.kind or (active and not use.parts):
                linear = operand.kind == "matmul" and parameter.dim() == 2 and part.step == 1
                use.kind = "linear" if linear else operand.kind
                use.conv_groups = max(1, operand.conv_groups // max(1, operand.tensor.numel() // held.numel))
            (use.parts if active else use.constant).append(part)
            use.guessed = use.guessed or held.guessed
            macs = operand.macs * parameter.numel() // held.numel
            if not active and operand.other.dim() < 2:
                macs = 0  # a norm by power iteration, not a part of what the model computes
            (use.costs if active else use.constant_costs).append(macs)

    def _record_altered(self, held: Held, operand: Operand) -> None:
        """A product reads what was made of parameters; its zeros are not theirs."""
        if held.made and not self._is_weight(held, operand):
            return  # data: each factor was read by the product that made it
        parameter, tensor = held.parameters[0], operand.tensor
        same = len(held.parameters) == 1 and held.order is None and tensor.numel() == parameter.numel() and not held.made
        module = self.running[-1] if self.running else None
        own = same and module is not None and any(p is parameter for p in module._parameters.values())
        if not own:
            self._lose(held.parameters, held.altered)
            return
        use = self.uses[id(parameter)]
        use.altered.append(held.altered)
        use.derived.append(parts_of(held, operand)[0])
        use.kind, use.conv_groups = operand.kind, operand.conv_groups
        use.costs.append(operand.macs)

    def _record_reads(self, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        if any(storage_of(out) in map(storage_of, inputs) for out in outputs):
            return  # a view or an in-place write reads nothing by itself
        for tensor in inputs:
            if (held := self.held.get(storage_of(tensor))) is not None:
                for parameter in held.parameters:
                    self.uses[id(parameter)].operations.append(name.removeprefix("aten::"))

    def _follow(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        inputs: list[Tensor],
        outputs: list[Tensor],
        weight: Operand | None,
        *,
        is_product: bool,
    ) -> None:
        """Mark what the outputs are: activations, values derived from parameters alone, or neither."""
        ids = [storage_of(tensor) for tensor in inputs]
        active = [tensor for tensor, key in zip(inputs, ids, strict=True) if key in self.tainted]
        for out in outputs:
            key = storage_of(out)
            if key in ids or key in self.own:
                self._write(func, inputs, out, bool(active))
                continue
            derived = self._factors(weight, out) if is_product else self._derive(func, args, kwargs, inputs, out, active)
            self._forget(key)  # new memory: whatever stood at this address before is gone
            self.tainted.discard(key)
            if active:
                self.tainted.add(key)
                if weight is not None:
                    self.mixtures[key] = self.held[storage_of(weight.tensor)].parameters
            if derived is not None and (not active or not is_product):
                self.held[key] = derived

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

    def _factors(self, weight: Operand | None, out: Tensor) -> Held | None:
        """What a product without activations has made: a weight out of two factors, or out of one and constants."""
        if weight is None:
            return None
        held, other = self.held[storage_of(weight.tensor)], self.held.get(storage_of(weight.other))
        both = [held] if other is None else [held, other]
        parameters = self._parameters(both)
        if not parameters:
            return None
        by_layer = weight.is_kernel or self.layers.weights is not None
        made = "data" if by_layer or any(one.made == "data" for one in both) else "weight"
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
        parts = {storage_of(t): self.held[storage_of(t)] for t in _tensors((args, kwargs)) if storage_of(t) in self.held}
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


def _tensors(tree: Any) -> list[Tensor]:
    """Dense tensors in the arguments of an operation; much faster than a general tree walk."""
    if isinstance(tree, Tensor):
        return [tree] if tree.layout == torch.strided else []
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, list | tuple):
        return []
    return [tensor for leaf in tree for tensor in _tensors(leaf)]


@contextlib.contextmanager
def plain_kernels() -> Iterator[None]:
    """The fused attention and recurrent paths hide their products in one operation."""
    enabled, mkldnn = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
        torch._C._set_mkldnn_enabled(mkldnn)
