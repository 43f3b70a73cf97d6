"""Training rules: what becomes of masks and of gradients while a masked weight trains (the gradients themselves: `ste`)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nmfx import text
from nmfx.errors import NmfxError


@dataclass(frozen=True)
class Rule:
    """One way to train a masked weight.

    Attributes:
        decay: what a dropped weight gets beside the gradient of the loss: SR-STE's pull to zero, by this factor or the one that
            the user gives; 0, nothing more; None, no gradient at all: only kept weights train.
        frozen: the masks of today stay; otherwise they follow the weights.
    """

    decay: float | None
    frozen: bool = False


RULES: dict[str, Rule] = {
    "sr-ste": Rule(decay=2e-4),  # Zhou et al., ICLR 2021
    "ste": Rule(decay=0.0),  # the straight-through estimator
    "fixed": Rule(decay=None, frozen=True),  # ASP
}


def resolve_rule(training: str, decay: float | None = None) -> Rule:
    """The rule called `training`, its factor replaced by `decay` where the rule has one to choose.

    Raises:
        NmfxError: no such rule, or a factor that is negative or not finite.
    """
    if training not in RULES:
        raise NmfxError(f"unknown training {training!r}{text.nearest(str(training), RULES)}; known: {', '.join(RULES)}")
    if decay is not None and not 0 <= decay < math.inf:
        raise NmfxError(f"training {training}: decay={decay}: expected a finite factor of 0 or more, such as 2e-4")
    rule = RULES[training]
    return Rule(decay, rule.frozen) if rule.decay and decay is not None else rule


def describe_rule(decay: float | None, frozen: bool) -> str:
    """The rule that trains so, in words: ``sr-ste 0.0002``, ``ste``, ``fixed``; and ``frozen`` where the rule would not."""
    alike = [name for name, rule in RULES.items() if (rule.decay is None, bool(rule.decay)) == (decay is None, bool(decay))]
    name = next((name for name in alike if RULES[name].frozen == frozen), alike[0])
    return f"{name}{f' {decay}' if decay else ''}{', frozen' if frozen and not RULES[name].frozen else ''}"
