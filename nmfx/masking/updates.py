"""What masked weights add to an update: SR-STE's pull and DominoSearch's penalty, once for each step of an optimiser.

Such a term belongs to the update, not to a backward pass: only there are gradients complete (accumulated over passes,
averaged over processes), unscaled and clipped, and only there is it known that an update happens. So hooks of torch.optim,
which run around every ``step`` of every optimiser, lend it gradients with the term, and give the own ones back afterwards.
They find masked weights through the modules that hold them, so it does not matter whether an optimiser was made before or
after the masks, on which copy of a model it works, or whether its weights are shared out by FSDP.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from nmfx.masking.weight import STATES, MaskState, find_mask, mask_name
from nmfx.sparsity.ste import pulled


class _Lent(NamedTuple):
    """A weight whose gradient is another one while an optimiser steps."""

    weight: nn.Parameter
    own: Tensor
    lent: Tensor


_owners: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()  # by id: a module may define equality
_steps: weakref.WeakKeyDictionary[Optimizer, list[list[_Lent]]] = weakref.WeakKeyDictionary()  # those that are running


def register_owner(owner: nn.Module) -> None:
    """Let optimisers find the masked weights of a module, as long as it lives."""
    _owners[id(owner)] = owner
    _install()


@torch.no_grad()
def pull(model: nn.Module) -> None:
    """Add to the gradients of masked weights what an optimiser of torch.optim finds added when it steps.

    For loops that update weights without such an optimiser, once before each update.
    """
    done: set[int] = set()  # a tied weight once
    for owner, attr, state in _masked(model.modules()):
        weight = owner._parameters.get(attr)
        if weight is not None and weight.grad is not None and id(weight) not in done:
            done.add(id(weight))
            if (grad := _gradient(owner, attr, state, weight, 1.0)) is not None:
                weight.grad = grad


@cache
def _install() -> None:
    register_optimizer_step_pre_hook(_before)
    register_optimizer_step_post_hook(_after)


def _before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Lend gradients: now, or whenever a closure has made new ones."""
    lent: list[_Lent] = []
    running = _steps.setdefault(optimizer, [])
    running[:] = [step for step in running if not step or any(one.weight.grad is one.lent for one in step)]  # not failed ones
    running.append(lent)
    place = 1 if len(args) > 1 else "closure"
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if not callable(closure):
        _lend(optimizer, lent)
        return None
    wrapped = _with_lending(closure, optimizer, lent)
    if place == 1:
        return (args[0], wrapped, *args[2:]), kwargs
    return args, {**kwargs, "closure": wrapped}


def _after(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if running := _steps.get(optimizer):
        _take_back(running.pop())


def _with_lending(closure: Callable[[], Any], optimizer: Optimizer, lent: list[_Lent]) -> Callable[[], Any]:
    def wrapped() -> Any:
        _take_back(lent)
        loss = closure()
        _lend(optimizer, lent)
        return loss

    return wrapped


@torch.no_grad()
def _lend(optimizer: Optimizer, lent: list[_Lent]) -> None:
    """Give each masked weight of this optimiser that has a gradient one with its term.

    An optimiser inside another, or a step that calls that of its base class, finds them lent already. Where the gradients are
    still scaled (fused optimisers unscale them themselves) the term is scaled as well; where the optimiser maximises, the
    term is turned round, since it shrinks weights in any case.
    """
    already = {id(one.lent) for running in list(_steps.values()) for step in running for one in step}
    scale = getattr(optimizer, "grad_scale", None)
    factor = 1.0 if scale is None else float(scale)
    wanted = {
        id(weight): -factor if group.get("maximize") else factor
        for group in optimizer.param_groups
        for weight in group["params"]
        if weight.grad is not None and id(weight.grad) not in already
    }
    for owner, attr, state in _masked(list(_owners.values())):
        weight = owner._parameters.get(attr)
        if weight is None or id(weight) not in wanted:
            continue
        factor = wanted.pop(id(weight))  # a tied weight once
        own = weight.grad
        if own is not None and (grad := _gradient(owner, attr, state, weight, factor)) is not None:
            lent.append(_Lent(weight, own, grad))
            weight.grad = grad


def _take_back(lent: list[_Lent]) -> None:
    for weight, own, other in lent:
        if weight.grad is other:  # the optimiser has not put another one there
            weight.grad = own
    lent.clear()


def _masked(modules: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, str, MaskState]]:
    """Every masked attribute of these modules: module, name, state."""
    for module in modules:
        for attr, state in module.__dict__.get(STATES, {}).items():
            yield module, attr, state


def _gradient(owner: nn.Module, attr: str, state: MaskState, weight: Tensor, factor: float) -> Tensor | None:
    """The gradient of a weight with its term; None if it has none."""
    grad, decay = weight.grad, state.spec.decay
    assert grad is not None
    if state.penalty is not None:
        amount, mask = state.penalty
        state.penalty = None  # of this update only
        return torch.addcmul(grad, weight, mask.to(weight.dtype), value=amount * factor)
    if not decay:
        return None
    if not _is_shared_out(weight):
        return pulled(grad, weight, _mask(owner, attr, state, weight), decay * factor)
    from torch.distributed.tensor import DTensor, Replicate  # here, as not every build of torch has them

    shared: Any = weight
    whole = DTensor.from_local(_mask(owner, attr, state, weight), shared.device_mesh, [Replicate()] * shared.device_mesh.ndim)
    mask = whole.redistribute(placements=shared.placements)  # each process takes its part of what it has
    local, part, own = (value.to_local() for value in (grad, weight, mask))  # type: ignore[attr-defined]
    sum_of_both = pulled(local, part, own, decay * factor)
    result: Tensor = DTensor.from_local(
        sum_of_both, shared.device_mesh, shared.placements, shape=grad.shape, stride=grad.stride()
    )
    return result


def _mask(owner: nn.Module, attr: str, state: MaskState, weight: Any) -> Tensor:
    """The whole mask of a weight as it is: that of the forward pass, unless it has changed since or a compiler has read it."""
    found = state.cache
    if state.spec.frozen or state.spec.derived:  # of what the last forward pass made of the weight
        mask = owner._buffers[mask_name(attr)]
        assert mask is not None
        return mask.to(weight.device)
    if found is not None and (found.dirty if _is_shared_out(weight) else found.holds(weight)):
        return found.mask
    whole = weight.full_tensor() if _is_shared_out(weight) else weight
    return find_mask(owner, attr, state.spec, whole.detach().contiguous())


def _is_shared_out(weight: Tensor) -> bool:
    return hasattr(weight, "placements")  # a DTensor
