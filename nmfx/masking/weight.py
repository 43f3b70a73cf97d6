"""One masked weight as it is read: computed when the parameter has changed, cached in between, and safe to write to."""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from nmfx.errors import NmfxError
from nmfx.masking.value import MaskedWeight
from nmfx.sparsity.layout import Grouping
from nmfx.sparsity.mask import make_mask, update_mask
from nmfx.sparsity.pattern import Pattern
from nmfx.sparsity.rules import RULES
from nmfx.sparsity.ste import MaskedCompute, MaskedRead

STATES = "_masked_sites"  # in an owner's __dict__: attribute -> MaskState
PROBE = 64  # weights compared on a cached read: writes through .data and fused optimisers leave the version as it was


@dataclass(frozen=True)
class MaskSpec:
    """What is asked of one masked attribute: its pattern, its groups, and how it trains.

    ``decay`` is the SR-STE factor, applied at updates (0: plain STE; None: gradients of kept weights only); ``frozen`` keeps
    the mask as it is; ``derived`` masks what the module makes of its weight, not the parameter
    (see `nmfx.masking.derived`), while SR-STE pulls the parameter's entries at the places that mask drops. ``score`` is the
    name of what ranks the weights (see `nmfx.sparsity.score`); what it needs lives in a buffer beside the mask.
    """

    name: str
    pattern: Pattern
    grouping: Grouping
    decay: float | None = RULES["sr-ste"].decay
    frozen: bool = False
    derived: bool = False
    score: str = "magnitude"


def mask_name(attr: str) -> str:
    """Name of the non-persistent buffer that holds the mask of `attr`."""
    return f"{attr}_mask"


def evidence_name(attr: str) -> str:
    """Name of the non-persistent buffer that holds what the score of `attr` needs, if it needs anything.

    Not persistent, as the keys of a converted model are those of the original; a checkpoint writes it beside the mask.
    """
    return f"{attr}_evidence"


def find_mask(owner: nn.Module, attr: str, spec: MaskSpec, weight: Tensor) -> Tensor:
    """A new mask of `weight` in plain operations (see `make_mask`)."""
    return make_mask(weight, spec.pattern.n, spec.grouping, spec.score, owner._buffers.get(evidence_name(attr)))


@dataclass(eq=False)
class _Cache:
    """The masked value last computed, and what shows whether it is still true."""

    parameter: Tensor
    version: int
    alias: Tensor  # holds the parameter's memory, so that a new tensor cannot appear at the same address
    mask: Tensor
    masked: Tensor
    masked_version: int
    probe: Tensor  # a view of a few weights, spread over rows and columns
    expected: Tensor
    requires_grad: bool
    view: MaskedWeight
    live: Tensor | None = None  # the differentiable value, one for all reads until the weight changes
    dirty: bool = False  # a backward has run: an optimiser may have written without a trace

    def holds(self, weight: Tensor) -> bool:
        if not (
            self.parameter is weight
            and self.version == weight._version
            and self.alias.data_ptr() == weight.data_ptr()
            and self.alias.dtype == weight.dtype
            and self.requires_grad == weight.requires_grad
        ):
            return False
        return self.probe.device.type != "cpu" or torch.equal(self.probe, self.expected)


class MaskState:
    """One masked attribute of one module: its spec, and the cached masked value. Copies and pickles without the cache."""

    def __init__(self, spec: MaskSpec) -> None:
        self.spec = spec
        self.cache: _Cache | None = None
        self.shared_out = False  # by FSDP
        self.penalty: tuple[float, Tensor] | None = None  # on the weights that a mask keeps, at the next update only

    def __reduce__(self) -> Any:
        return MaskState, (self.spec,)

    def respec(self, *, keep_mask: bool, **changes: Any) -> None:
        """Change fields of the spec, and forget what was cached under the one before (see `nmfx.masking.sites.respec`)."""
        self.spec = replace(self.spec, **changes)
        if not keep_mask:
            self.cache = None
        elif self.cache is not None:
            self.cache.live = None  # it would give gradients of the kind before

    def read(self, owner: nn.Module, attr: str, weight: Any) -> Any:
        """The masked value of `weight`; recomputed only when the parameter has changed since the last read.

        Raises:
            NmfxError: the value was written to in a way that cannot be followed to the parameter.
        """
        if not isinstance(weight, Tensor):  # None, or a Proxy while fx traces: the graph reads the attribute when it runs
            return weight
        if not _can_cache(weight):
            if _is_shard(weight):
                self.shared_out = True
                return weight
            return self._compute(owner, attr, weight)
        self.check_writes()
        cache = self.cache
        if cache is None or not cache.holds(weight):
            cache = self.refresh(owner, attr, weight)
        elif cache.dirty:
            cache = self._recheck(owner, attr, weight, cache)
        if owner._buffers[mask_name(attr)] is not cache.mask:  # found when another owner of a tied weight was read
            owner._buffers[mask_name(attr)] = cache.mask
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return cache.view
        if cache.live is None or self.shared_out:  # FSDP takes up what each forward pass gives to the weight by itself
            kept_only = self.spec.decay is None
            value = cast(Tensor, MaskedRead.apply(weight, cache.mask, cache.masked, kept_only, weakref.ref(cache)))
            cache.live = MaskedWeight.over(value, weight, cache.view.refresh_value)
        return cache.live

    def check_writes(self) -> None:
        """Raise if the cached value was written to behind our back; what was written is not in the parameter."""
        if self.cache is not None and self.cache.masked_version != self.cache.masked._version:
            self.cache = None
            raise NmfxError(
                f"{self.spec.name}: its masked value was written to through a view or an out= argument, which does not reach "
                f"the parameter; write to the attribute itself, or to the parameter in named_parameters()"
            )

    @torch.inference_mode(False)  # a tensor made in inference mode could not be trained with later
    @torch.no_grad()
    def refresh(self, owner: nn.Module, attr: str, weight: Tensor, *, reuse: bool = True, update: bool = True) -> _Cache:
        """Recompute the mask (unless frozen) and the masked value.

        Args:
            owner, attr, weight: the module, the name of the attribute, and its parameter.
            reuse: write into the tensors that are already there; otherwise into new ones.
            update: find the mask anew; otherwise the one that is there is taken.

        Returns:
            The new cache, which is also kept.
        """
        old, mask = self.cache if reuse else None, cast(Tensor, owner._buffers[mask_name(attr)])
        mask = mask.to(weight.device)
        update = update and not self.spec.frozen
        if update and (not reuse or mask.stride() != weight.stride()):
            mask = torch.empty_like(weight, dtype=torch.bool)
        owner._buffers[mask_name(attr)] = mask
        like = (weight.dtype, weight.device, weight.stride())
        if old is not None and (old.masked.dtype, old.masked.device, old.masked.stride()) == like:
            masked = old.masked
        else:
            masked = torch.empty_like(weight, requires_grad=False)
        if update:
            write_mask(owner, attr, self.spec, weight, mask, masked)
        else:
            torch.where(mask, weight, weight.new_zeros(()), out=masked)
        alias = weight.detach()
        probe = _probe(alias)
        # As nn.Parameter is made: a leaf, not a view. at::matmul chooses its kernel by requires_grad, even without gradients.
        view = Tensor._make_subclass(MaskedWeight, masked, weight.requires_grad)
        view.parameter, view.refresh_value = weight, self._refresher(owner, attr)
        self.cache = _Cache(
            weight, weight._version, alias, mask, masked, masked._version, probe, probe.clone(), weight.requires_grad, view
        )
        return self.cache

    def _recheck(self, owner: nn.Module, attr: str, weight: Tensor, cache: _Cache) -> _Cache:
        """After a backward, see whether the weight has changed without a trace; the old tensors may be waiting for theirs."""
        fresh = self.refresh(owner, attr, weight, reuse=False)
        if not torch.equal(fresh.masked, cache.masked):
            return fresh
        # A new node, because FSDP orders its work by the age of nodes: it frees a weight behind those made in this forward.
        self.cache, cache.dirty, cache.live = cache, False, None
        return cache

    def _refresher(self, owner: nn.Module, attr: str) -> Callable[[], None]:
        """A function that brings the masked value up to date; a write through the value calls it."""
        place, me = weakref.ref(owner), weakref.ref(self)  # no cycle: masked values go when their module goes

        def refresh_value() -> None:
            module, state = place(), me()
            if module is not None and state is not None and isinstance(weight := module._parameters.get(attr), nn.Parameter):
                state.refresh(module, attr, weight)

        return refresh_value

    def read_derived(self, owner: nn.Module, attr: str, value: Tensor) -> Tensor:
        """The masked value of what the module has made of its weight; the mask is that of `value`."""
        mask = cast(Tensor, owner._buffers[mask_name(attr)])
        if not self.spec.frozen and type(value) in (Tensor, nn.Parameter) and not value.is_meta and not is_followed():
            mask = torch.empty_like(value, dtype=torch.bool, requires_grad=False)
            write_mask(owner, attr, self.spec, value, mask, torch.empty_like(value, requires_grad=False))
            before = cast(Tensor, owner._buffers[mask_name(attr)])
            if before.device == mask.device and torch.equal(before, mask):
                mask = before  # a read changes nothing
            owner._buffers[mask_name(attr)] = mask
        elif not self.spec.frozen:
            mask = find_mask(owner, attr, self.spec, value)
        return cast(Tensor, MaskedCompute.apply(value, mask.to(value.device), self.spec.decay is None))

    def _compute(self, owner: nn.Module, attr: str, weight: Tensor) -> Tensor:
        """The masked value as plain operations, for compilers and function transforms, which must see the computation."""
        mask = cast(Tensor, owner._buffers[mask_name(attr)])
        if not self.spec.frozen:
            mask = find_mask(owner, attr, self.spec, weight)
        return cast(Tensor, MaskedCompute.apply(weight, mask, self.spec.decay is None))


def write_mask(owner: nn.Module, attr: str, spec: MaskSpec, weight: Tensor, mask: Tensor, masked: Tensor) -> None:
    """`update_mask` for any memory format: a channels-last weight still views as (outer, length, inner), others are copied.

    Args:
        owner, attr: where the evidence of the score is.
        spec: what is asked of the mask.
        weight: the values to mask.
        mask, masked: written to; see `update_mask`.
    """
    weight = weight.detach()
    try:
        spec.grouping.as_lines(mask)
    except RuntimeError:
        mask.copy_(find_mask(owner, attr, spec, weight.contiguous()))
        torch.where(mask, weight, weight.new_zeros(()), out=masked)
    else:
        evidence = owner._buffers.get(evidence_name(attr))
        update_mask(weight, spec.pattern.n, spec.grouping, mask, masked, spec.score, evidence)


def _probe(alias: Tensor) -> Tensor:
    """A strided view of about PROBE entries; a step coprime to the size meets all rows and columns alike."""
    step = max(1, alias.numel() // PROBE)
    while math.gcd(step, alias.numel()) != 1:
        step += 1
    return alias.as_strided((-(-alias.numel() // step),), (step,), alias.storage_offset())


def _is_shard(weight: Tensor) -> bool:
    """Whether torch.distributed asks for the shard that it put here itself; what a module computes with is always masked."""
    if type(weight).__name__ != "DTensor":  # first, as dynamo cannot follow a look at frames
        return False
    return str(sys._getframe(3).f_globals.get("__name__", "")).startswith("torch.distributed.")


def _can_cache(weight: Tensor) -> bool:
    """Whether this is a real parameter in eager mode: not compiled, exported, fake, meta, or inside a function transform."""
    return not is_followed() and type(weight) is nn.Parameter and not weight.is_inference() and weight.device.type != "meta"


def is_followed() -> bool:
    """Whether a compiler or exporter is watching, which must see the whole computation."""
    return torch.compiler.is_compiling() or bool(torch._C._get_tracing_state())
