"""Follows every parameter through a forward pass into the products that read it.

A dispatch mode sees each aten operation of one eval and one train forward; `storages` says what an operand holds of which
parameter. No module type is asked for anything, so functional calls, attention projections, LSTMs and weights inside fx leaves
are found alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nmfx.masking.derived import READERS
from nmfx.models.places import Held, Part, parts_of
from nmfx.models.products import PRODUCTS, Operand
from nmfx.models.storages import Storages, dense_tensors, storage_of

LAYERS = dict.fromkeys(READERS, 1) | {F.bilinear: 2, F.multi_head_attention_forward: 3}  # and how many inputs come first
INPUTS = frozenset(("input", "input1", "input2", "query", "key", "value"))


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
        before, self.weights = self.weights, {storage_of(tensor) for tensor in dense_tensors(given)}
        try:
            return func(*args, **kwargs)
        finally:
            self.weights = before


class Census(TorchDispatchMode):
    """Records how a forward pass uses the parameters of a model.

    Attributes:
        uses: what was seen, by the id of the parameter (or buffer).
        storages: what the memory in use holds of parameters.
        plain: ids of parameters that products read in their own memory.
        running: modules whose forward pass is under way, the innermost last (see `watch`).
    """

    def __init__(self, parameters: Iterable[Tensor], inputs: Any, buffers: Iterable[Tensor] = ()) -> None:
        super().__init__()
        parameters, buffers = list(parameters), [b for b in buffers if b.dim() > 1 and b.is_floating_point()]
        self.uses = {id(t): Use() for t in (*parameters, *buffers)}
        self.storages = Storages(parameters, buffers, inputs)
        self.running: list[nn.Module] = []
        self.plain: set[int] = set()
        self.layers = Layers()

    def __enter__(self) -> Any:
        self.layers.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.layers.__exit__(*error)

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
        name, inputs, outputs = func._schema.name, dense_tensors((args, kwargs)), dense_tensors(out)
        operands = PRODUCTS[name](args, outputs[0]) if name in PRODUCTS else []
        weight = min((o for o in operands if storage_of(o.tensor) in self.storages.held), key=self._weight_order, default=None)
        if weight is not None:  # the other operand of a product of two parameters is data (a learned query)
            self._record_weight(weight)
        elif operands and operands[0].is_kernel:
            for parameter in self.storages.mixtures.get(storage_of(operands[0].tensor), ()):
                self.uses[id(parameter)].mixed = True
        self._record_reads(name, [t for t in inputs if weight is None or t is not weight.tensor], outputs)
        by_layer = self.layers.weights is not None
        self.storages.follow(func, args, kwargs, inputs, outputs, weight, is_product=bool(operands), by_layer=by_layer)
        return out

    def _weight_order(self, operand: Operand) -> tuple[bool, bool, bool]:
        """What a layer takes as its weight comes first, parameters before buffers, and what was not altered before what was."""
        held, given = self.storages.held[storage_of(operand.tensor)], self.layers.weights or ()
        return storage_of(operand.tensor) not in given, id(held.parameters[0]) in self.storages.buffers, bool(held.altered)

    def _is_weight(self, held: Held, operand: Operand) -> bool:
        """Whether what a product has made is the weight of this one, rather than data (a learned query in an attention)."""
        if operand.is_kernel or storage_of(operand.tensor) in (self.layers.weights or ()):
            return True
        return held.made == "weight" and storage_of(operand.other) in self.storages.tainted

    def _record_lost(self, parameters: Iterable[Tensor], name: str) -> None:
        """A product reads what is made of parameters and does not receive their zeros."""
        for parameter in parameters:
            use = self.uses[id(parameter)]
            use.altered.append(name)
            use.derived.append(None)

    def _record_weight(self, operand: Operand) -> None:
        held = self.storages.held[storage_of(operand.tensor)]
        self._record_lost(held.beside, "mul")
        if held.altered:
            self._record_altered(held, operand)
        else:
            self._record_parts(held, operand)

    def _record_parts(self, held: Held, operand: Operand) -> None:
        """A product reads entries of parameters as they are."""
        active = storage_of(operand.other) in self.storages.tainted
        if storage_of(operand.tensor) in self.storages.own:
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
            self._record_lost(held.parameters, held.altered)
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
            if (held := self.storages.held.get(storage_of(tensor))) is not None:
                for parameter in held.parameters:
                    self.uses[id(parameter)].operations.append(name.removeprefix("aten::"))


@contextlib.contextmanager
def plain_kernels(*, convolutions: bool = True) -> Iterator[None]:
    """The fused attention and recurrent paths hide their products in one operation.

    Args:
        convolutions: whether these are plain, too; oneDNN's, which are much faster, can stay where nothing is recurrent.
    """
    enabled, mkldnn = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch._C._set_mkldnn_enabled(mkldnn and not convolutions)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
        torch._C._set_mkldnn_enabled(mkldnn)
