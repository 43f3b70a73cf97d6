"""How masks train: chosen for a converted model, and said of it."""

from __future__ import annotations

from torch import Tensor, nn

from nmfx.masking.sites import masked_sites, respec
from nmfx.sparsity.rules import describe_rule, resolve_rule


def set_training(model: nn.Module, training: str, decay: float | None = None) -> None:
    """Train the masks of a converted model in another way (see `transform`); they stay as they are until a weight changes.

    Raises:
        NmfxError: no such training rule, or a decay out of range.
    """
    rule, sites = resolve_rule(training, decay), list(masked_sites(model))
    for site in sites:
        _ = site.mask  # of the weights as they are now
    respec(sites, keep_masks=True, decay=rule.decay, frozen=rule.frozen)


def describe(model: nn.Module) -> dict[str, str]:
    """The pattern of every site, and how its mask trains."""
    specs = [site.spec for site in masked_sites(model)]
    scores = {spec.name: "" if spec.score == "magnitude" else f" by {spec.score}" for spec in specs}
    return {
        f"pattern of {spec.name}": f"{spec.pattern} {describe_rule(spec.decay, spec.frozen)}{scores[spec.name]}"
        for spec in specs
    }


def frozen_masks(model: nn.Module) -> dict[str, Tensor]:
    """The masks that do not follow from the weights, by the names of their sites."""
    return {site.name: site.mask for site in masked_sites(model) if site.spec.frozen}
