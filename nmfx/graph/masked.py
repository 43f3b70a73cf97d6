"""The masked attribute: a module's weight read as ``where(mask, weight, 0)``, everything else as it was.

The owner changes class to a subclass of its own class in which the attribute is a property. The Parameter stays in
``_parameters`` under its own name, so state-dict keys, optimisers and checkpoints see what they always saw; whoever reads
``module.weight`` (its own forward, a parent's ``F.linear``, ``F.multi_head_attention_forward``, an LSTM) gets the masked value.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from nmfx.errors import NmfxError
from nmfx.sparsity.layout import Grouping
from nmfx.sparsity.mask import make_mask, update_mask
from nmfx.sparsity.pattern import Pattern
from nmfx.sparsity.ste import MaskedRead

STATES = "_masked_sites"  # in the owner's __dict__: attribute -> MaskState
PROBE = 64  # weights compared on a cached read: fused optimisers and writes through .data leave the version as it was


@dataclass(frozen=True)
class MaskSpec:
    """What is asked of one masked attribute: its pattern, its groups, and how it trains.

    ``decay`` is the SR-STE factor (0: plain STE; None: gradients of kept weights only); ``frozen`` keeps the mask as it is.
    """

    name: str
    pattern: Pattern
    grouping: Grouping
    decay: float | None = 2e-4
    frozen: bool = False


class MaskedWeight(Tensor):
    """The masked value of a weight, as a plain tensor whose writes reach the parameter.

    In-place methods, ``.data``, ``.grad`` and hooks act on the parameter behind it. Writes through a view of it are noticed by
    the version counter and carried over at the next read. It computes as any tensor does, at no extra cost.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    parameter: nn.Parameter

    @staticmethod
    def over(value: Tensor, parameter: Tensor) -> MaskedWeight:
        """`value`, tied to `parameter`."""
        result = value.as_subclass(MaskedWeight)
        result.parameter = cast(nn.Parameter, parameter)
        return result

    data = property(  # type: ignore[assignment]
        lambda self: MaskedWeight.over(self.detach(), self.parameter),
        lambda self, value: setattr(self.parameter, "data", value),
    )
    grad = property(  # type: ignore[assignment]
        lambda self: self.parameter.grad, lambda self, value: setattr(self.parameter, "grad", value)
    )
    requires_grad = property(  # type: ignore[assignment]
        lambda self: self.parameter.requires_grad, lambda self, value: setattr(self.parameter, "requires_grad", value)
    )

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.detach().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().clone().__reduce_ex__(protocol)


def _forward_to_parameter(name: str) -> Any:
    def method(self: MaskedWeight, *args: Any, **kwargs: Any) -> Any:
        result = getattr(self.parameter, name)(*args, **kwargs)
        return self if result is self.parameter else result

    method.__name__ = name
    return method


_WRITES = [n for n in dir(Tensor) if n.endswith("_") and not n.startswith("_")]
_WRITES += ["__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "register_hook"]
for _name in _WRITES:
    setattr(MaskedWeight, _name, _forward_to_parameter(_name))


@dataclass(eq=False)
class _Cache:
    """The masked value last computed, and what shows whether it is still true."""

    parameter: Tensor
    version: int
    alias: Tensor  # holds the parameter's memory, so that a new tensor cannot appear at the same address
    masked: Tensor
    masked_version: int
    probe: Tensor
    expected: Tensor
    view: Tensor

    def holds(self, weight: Tensor) -> bool:
        if not (
            self.parameter is weight
            and self.version == weight._version
            and self.alias.data_ptr() == weight.data_ptr()
            and self.masked_version == self.masked._version
            and self.alias.dtype == weight.dtype
        ):
            return False
        return self.probe.device.type != "cpu" or torch.equal(self.probe, self.expected)


class MaskState:
    """One masked attribute of one module: its spec, and the cached masked value. Copies and pickles without the cache."""

    def __init__(self, spec: MaskSpec) -> None:
        self.spec = spec
        self.cache: _Cache | None = None

    def __reduce__(self) -> Any:
        return MaskState, (self.spec,)

    def read(self, owner: nn.Module, attr: str, weight: Any) -> Any:
        """The masked value of `weight`; recomputed only when the parameter has changed since the last read."""
        if not isinstance(weight, Tensor):  # None, or a Proxy while fx traces: the graph reads the attribute when it runs
            return weight
        mask = cast(Tensor, owner._buffers[mask_name(attr)])
        if not _can_cache(weight):
            return self._compute(weight, mask)
        cache = self.cache
        if cache is None or not cache.holds(weight):
            cache = self.refresh(owner, attr, weight)
            mask = cast(Tensor, owner._buffers[mask_name(attr)])
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return cache.view
        return MaskedWeight.over(MaskedRead.apply(weight, mask, cache.masked, self.spec.decay), weight)

    @torch.inference_mode(False)  # a tensor made in inference mode could not be trained with later
    @torch.no_grad()
    def refresh(self, owner: nn.Module, attr: str, weight: Tensor, *, update: bool = True) -> _Cache:
        """Recompute the mask (unless frozen) and the masked value into the tensors that are already there."""
        old, mask = self.cache, cast(Tensor, owner._buffers[mask_name(attr)])
        if old is not None and old.parameter is weight and old.masked_version != old.masked._version:
            weight.copy_(old.masked)  # written through a view of the masked value: the parameter is where it belongs
        if mask.device != weight.device:
            owner._buffers[mask_name(attr)] = mask = mask.to(weight.device)
        fits = old is not None and old.masked.dtype == weight.dtype and old.masked.device == weight.device
        fits = fits and old is not None and old.masked.stride() == weight.stride()
        masked = old.masked if old is not None and fits else torch.empty_like(weight, requires_grad=False)
        if self.spec.frozen or not update:
            torch.where(mask, weight, weight.new_zeros(()), out=masked)
        else:
            if mask.stride() != weight.stride():
                owner._buffers[mask_name(attr)] = mask = torch.empty_like(weight, dtype=torch.bool)
            _update(weight, self.spec, mask, masked)
        alias = weight.detach()
        flat = alias.as_strided((alias.numel(),), (1,), alias.storage_offset())[:: max(1, alias.numel() // PROBE)]
        view = MaskedWeight.over(masked.view_as(masked), weight)
        version = (weight._version, masked._version)
        self.cache = _Cache(weight, version[0], alias, masked, version[1], flat, flat.clone(), view)
        return self.cache

    def _compute(self, weight: Tensor, mask: Tensor) -> Tensor:
        """The same value as plain operations, for compilers and function transforms, which must see the computation."""
        spec = self.spec
        if not spec.frozen:
            mask = make_mask(weight, spec.pattern.n, spec.grouping)
        masked = torch.where(mask, weight.detach(), torch.zeros((), dtype=weight.dtype, device=weight.device))
        return cast(Tensor, MaskedRead.apply(weight, mask, masked, spec.decay))


def _update(weight: Tensor, spec: MaskSpec, mask: Tensor, masked: Tensor) -> None:
    """`update_mask` for any memory format: a channels-last weight still views as (outer, length, inner), others are copied."""
    try:
        spec.grouping.as_lines(mask)
    except RuntimeError:
        mask.copy_(make_mask(weight.contiguous(), spec.pattern.n, spec.grouping))
        torch.where(mask, weight, weight.new_zeros(()), out=masked)
    else:
        update_mask(weight.detach(), spec.pattern.n, spec.grouping, mask, masked)


def _can_cache(weight: Tensor) -> bool:
    """Whether this is a real parameter in eager mode: not compiled, exported, fake, meta, or inside a function transform."""
    return (
        not torch.compiler.is_compiling()
        and type(weight) is nn.Parameter
        and not weight.is_inference()
        and weight.device.type != "meta"
    )


def mask_name(attr: str) -> str:
    """Name of the non-persistent buffer that holds the mask of `attr`."""
    return f"{attr}_mask"


@cache
def _masked_class(base: type[nn.Module], attrs: tuple[str, ...]) -> type[nn.Module]:
    """Subclass of `base` in which `attrs` are read masked. Made once for each pair, so that compilers see stable types."""

    def masked(attr: str) -> property:
        def read(self: nn.Module) -> Any:
            # Through __getattr__, which fx patches while it traces; reading _parameters would bake a constant.
            return self.__dict__[STATES][attr].read(self, attr, nn.Module.__getattr__(self, attr))

        def write(self: nn.Module, value: Any) -> None:
            raise NmfxError(f"{type(self).__name__}.{attr} is masked: assign an nn.Parameter, got {type(value).__name__}")

        return property(read, write)

    def reduce(self: nn.Module, protocol: int) -> Any:
        state = base.__getstate__(self)  # type: ignore[attr-defined]
        return _rebuild, (base, attrs), dict(state)

    def save(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        for attr in attrs:
            getattr(self, attr)  # carries over what was written through a view of the masked value
        base._save_to_state_dict(self, *args, **kwargs)

    body: dict[str, Any] = {attr: masked(attr) for attr in attrs} | {"_save_to_state_dict": save}
    if issubclass(base, nn.RNNBase):  # keeps its weights in a list of its own: read them by name instead
        body["_flat_weights"] = property(
            lambda self: [getattr(self, name, None) for name in self._flat_weights_names], lambda self, value: None
        )
    # fx takes modules for leaves by their class's __module__: a masked convolution is as much a leaf as a plain one.
    body |= {"__module__": base.__module__, "__reduce_ex__": reduce, "_plain_class": base, "_masked_attrs": attrs}
    return type(f"Masked{base.__name__}", (base,), body)


def _rebuild(base: type[nn.Module], attrs: tuple[str, ...]) -> nn.Module:
    cls = _masked_class(base, attrs)  # type: ignore[arg-type]
    return cls.__new__(cls)


def is_masked(module: nn.Module) -> bool:
    """Whether any attribute of this module is masked."""
    return hasattr(type(module), "_plain_class")


def mask_attribute(owner: nn.Module, attr: str, spec: MaskSpec) -> None:
    """Mask ``owner.attr`` in place from now on.

    Raises:
        NmfxError: the module already has something under the mask's name.
    """
    weight = cast(nn.Parameter, owner._parameters[attr])
    attrs: tuple[str, ...] = (attr,)
    if is_masked(owner):
        attrs = tuple(dict.fromkeys((*type(owner)._masked_attrs, attr)))  # type: ignore[attr-defined]
    elif STATES not in owner.__dict__:
        owner.__dict__[STATES] = {}
    if attr not in owner.__dict__[STATES]:
        if hasattr(owner, mask_name(attr)):
            raise NmfxError(f"{spec.name}: its module already has an attribute {mask_name(attr)!r}; rename that one")
        mask = torch.empty_like(weight, dtype=torch.bool, requires_grad=False)
        if weight.device.type != "meta":
            _update(weight, spec, mask, torch.empty_like(weight, requires_grad=False))
        owner.register_buffer(mask_name(attr), mask, persistent=False)
    owner.__dict__[STATES][attr] = MaskState(spec)
    owner.__dict__.pop("_flat_weights", None)
    owner.__class__ = _masked_class(plain_class(owner), attrs)  # type: ignore[arg-type]


def unmask(module: nn.Module, *, keep_masked: bool) -> None:
    """Give `module` its own class back, in place.

    Args:
        keep_masked: write the masked values into the parameters; otherwise the dense ones stay.
    """
    if not is_masked(module):
        return
    values = {attr: getattr(module, attr) for attr in module.__dict__[STATES]} if keep_masked else {}
    for attr in module.__dict__.pop(STATES):
        del module._buffers[mask_name(attr)]
        module._non_persistent_buffers_set.discard(mask_name(attr))
    module.__class__ = plain_class(module)
    with torch.no_grad():
        for attr, value in values.items():
            cast(nn.Parameter, module._parameters[attr]).copy_(value)
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module before any of its attributes was masked."""
    return getattr(type(module), "_plain_class", type(module))


@dataclass(frozen=True)
class MaskedSite:
    """A masked attribute where it stands in a model."""

    owner: nn.Module
    path: str
    attr: str
    state: MaskState

    @property
    def spec(self) -> MaskSpec:
        """Pattern, groups and training settings."""
        return self.state.spec

    @property
    def parameter(self) -> nn.Parameter:
        """The dense weight."""
        return cast(nn.Parameter, self.owner._parameters[self.attr])

    @property
    def mask(self) -> Tensor:
        """The mask as of the current weights: bool, true = kept."""
        getattr(self.owner, self.attr)  # refreshes the mask when the weight has changed
        return cast(Tensor, self.owner._buffers[mask_name(self.attr)])


def masked_sites(model: nn.Module) -> Iterator[MaskedSite]:
    """Every masked attribute of `model`, in module order; a tied weight comes once for each owner."""
    for path, module in model.named_modules():
        if is_masked(module):
            for attr, state in module.__dict__[STATES].items():
                yield MaskedSite(module, path, attr, state)


def freeze(model: nn.Module, frozen: bool = True) -> None:
    """Hold every mask as it is now, or with ``frozen=False`` let the masks follow the weights again."""
    for site in masked_sites(model):
        if frozen:
            _ = site.mask  # the mask of the current weights is the one to hold
        site.state.spec = replace(site.spec, frozen=frozen)


def throw_away_copy(model: nn.Module, device: str | None = "meta") -> nn.Module:
    """An unmasked deep copy to run and trace: on the meta device it costs no memory; with None the data is copied too."""
    memo: dict[int, Any] = {}
    if device is not None:
        for tensor in (*model.parameters(), *model.buffers()):
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            grad = tensor.requires_grad
            memo[id(tensor)] = nn.Parameter(empty, grad) if isinstance(tensor, nn.Parameter) else empty
    result = copy.deepcopy(model, memo)
    for module in result.modules():
        unmask(module, keep_masked=False)
    return result
