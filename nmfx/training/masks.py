"""How masks train: chosen for a converted model, and said of it."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from nmfx.errors import NmfxError
from nmfx.masking.owner import masked_sites
from nmfx.masking.weight import MaskSpec, MaskState
from nmfx.passes.transform import Training


def set_training(model: nn.Module, training: Training, decay: float = 2e-4) -> None:
    """Train the masks of a converted model in another way (see `transform`); they stay as they are until a weight changes."""
    if training not in ("sr-ste", "ste", "fixed") or not 0 <= decay < float("inf"):
        raise NmfxError(
            f"training={training!r}, decay={decay}: expected sr-ste, ste or fixed, and a finite factor of 0 or more"
        )
    factor = {"sr-ste": decay, "ste": 0.0, "fixed": None}[training]
    for state in _states(model):
        _replace(state, replace(state.spec, decay=factor, frozen=training == "fixed"))


def describe(model: nn.Module) -> dict[str, str]:
    """The pattern of every site, and how its mask trains."""
    return {f"pattern of {site.spec.name}": f"{site.spec.pattern} {_training(site.spec)}" for site in masked_sites(model)}


def frozen_masks(model: nn.Module) -> dict[str, Tensor]:
    """The masks that do not follow from the weights, by the names of their sites."""
    return {f"{site.path}.{site.attr}".lstrip("."): site.mask for site in masked_sites(model) if site.spec.frozen}


def _states(model: nn.Module) -> list[MaskState]:
    return list(dict.fromkeys(site.state for site in masked_sites(model)))  # one for all owners of a tied weight


def _replace(state: MaskState, spec: MaskSpec) -> None:
    state.spec = spec
    if state.cache is not None:
        state.cache.live = None  # it would give gradients of the kind before


def _training(spec: MaskSpec) -> str:
    kind = "fixed" if spec.decay is None else f"sr-ste {spec.decay}" if spec.decay else "ste"
    return f"{kind}, frozen" if spec.frozen and spec.decay is not None else kind
