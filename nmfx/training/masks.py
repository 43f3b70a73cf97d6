"""How masks train: chosen for a converted model, and said of it."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from nmfx.masking.owner import masked_sites
from nmfx.masking.weight import MaskSpec, MaskState
from nmfx.sparsity.rules import Training, describe_rule, resolve_rule


def set_training(model: nn.Module, training: Training, decay: float | None = None) -> None:
    """Train the masks of a converted model in another way (see `transform`); they stay as they are until a weight changes.

    Raises:
        NmfxError: no such training rule, or a decay out of range.
    """
    rule = resolve_rule(training, decay)
    for state in _states(model):
        _replace(state, replace(state.spec, decay=rule.decay, frozen=rule.frozen))


def describe(model: nn.Module) -> dict[str, str]:
    """The pattern of every site, and how its mask trains."""
    return {f"pattern of {site.spec.name}": f"{site.spec.pattern} {describe_rule(site.spec.decay, site.spec.frozen)}" for site in masked_sites(model)}


def frozen_masks(model: nn.Module) -> dict[str, Tensor]:
    """The masks that do not follow from the weights, by the names of their sites."""
    return {f"{site.path}.{site.attr}".lstrip("."): site.mask for site in masked_sites(model) if site.spec.frozen}


def _states(model: nn.Module) -> list[MaskState]:
    return list(dict.fromkeys(site.state for site in masked_sites(model)))  # one for all owners of a tied weight


def _replace(state: MaskState, spec: MaskSpec) -> None:
    state.spec = spec
    if state.cache is not None:
        state.cache.live = None  # it would give gradients of the kind before
