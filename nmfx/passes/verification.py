"""verify(model): every group of every sparse weight holds at most N non-zeros, also where a product receives it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nmfx.errors import SchemeError, TraceError, VerificationError
from nmfx.masking.owner import derived_or_own
from nmfx.masking.sites import check_masks, masked_sites, recheck_weights
from nmfx.models.census import find_sites
from nmfx.models.example import Example, example_for
from nmfx.models.site import weight_of
from nmfx.passes.receiving import received
from nmfx.passes.transform import AnyScheme, resolve_scheme
from nmfx.sparsity.layout import Grouping
from nmfx.sparsity.mask import check_groups

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verified:
    """Counts of `verify`: sites and groups checked, weights in them, and non-zeros found.

    ``received`` is the number of sites that were also checked where a product received them, ``unseen`` names the others: the
    model could not be run, or did not use them on this example.
    """

    sites: int
    groups: int
    weights: int
    nonzeros: int
    received: int = field(default=0, compare=False)
    unseen: tuple[str, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        """One line of what was checked, and of what was not."""
        line = f"{self.groups:,} groups of {self.sites} sites hold at most N"
        if not self.unseen:
            return line
        few = ", ".join(self.unseen[:3]) + ", ..." * (len(self.unseen) > 3)
        return f"{line}; what products receive was seen for {self.received} of them only (not for {few})"


@dataclass(frozen=True)
class _Check:
    parameter: nn.Parameter
    value: Tensor
    n: int
    grouping: Grouping


def verify(model: nn.Module, scheme: AnyScheme | None = None, *, example_input: Any = None) -> Verified:
    """Check that every group of every sparse site holds at most N non-zeros: as the model reads it, and as products get it.

    The model runs once, in eval mode, and every convolution and matmul is looked at; where no example can be had (none is
    given, and the model does not run on what its configuration says), only the weights are checked, and the result and the
    log say so.

    Args:
        scheme: needed for plain (baked) models; a converted model carries its own.
        example_input: what the forward pass takes (see `find_sites`).

    Raises:
        VerificationError: naming the first group that holds more, sites that have lost their masks since `transform` (fused or
            replaced modules), or a model with nothing to verify.
        TraceError: the forward pass fails on `example_input`.
    """
    if isinstance(scheme, Tensor):
        raise SchemeError("verify: expected a scheme, got a tensor; an example is given by example_input=")
    recheck_weights(model)
    check_masks(model)
    checks = _masked_checks(model) if scheme is None else _scheme_checks(model, scheme, example_input)
    groups = sum(check_groups(name, c.value, c.n, c.grouping) for name, c in checks.items())
    arrived = _received(model, example_input)
    unseen = tuple(name for name, check in checks.items() if id(check.parameter) not in arrived)
    for name, check in checks.items():
        if (nonzero := arrived.get(id(check.parameter))) is not None:
            try:
                check_groups(name, nonzero, check.n, check.grouping)
            except VerificationError as error:
                raise VerificationError(f"zeros do not reach the operation: in what it receives, {error}") from None
    values = [check.value for check in checks.values()]
    weights, nonzeros = sum(v.numel() for v in values), sum(int(v.count_nonzero()) for v in values)
    result = Verified(len(checks), groups, weights, nonzeros, len(checks) - len(unseen), unseen)
    if unseen:
        log.warning("%s: %s", type(model).__name__, result)
    return result


def _masked_checks(model: nn.Module) -> dict[str, _Check]:
    checks = {m.spec.name: _Check(m.parameter, m.value, m.spec.pattern.n, m.spec.grouping) for m in masked_sites(model)}
    if not checks:
        raise VerificationError(f"{type(model).__name__}: nothing is masked; give the scheme it should obey")
    return checks


def _scheme_checks(model: nn.Module, scheme: AnyScheme, example_input: Any) -> dict[str, _Check]:
    sites, checks = find_sites(model, example_input), {}
    resolved = resolve_scheme(scheme, sites)
    for name, pattern in resolved.items():
        (path, attr), site = sites[name].owners[0], sites[name]
        value = derived_or_own(model.get_submodule(path), attr, derived=site.derived)
        checks[name] = _Check(weight_of(model, site), value, pattern.n, resolved.grouping(site))
    return checks


def _received(model: nn.Module, example_input: Any) -> Mapping[int, Tensor]:
    """Entries of each parameter, by its id, that a product received as non-zero; empty where the model cannot be run."""
    if any(t.device.type == "meta" for t in model.parameters()):
        return {}
    given = example_for(model) if example_input is None else example_input
    example = _random(given) if isinstance(given, Example) else Example.of(given)  # an Example need not hold values
    try:
        return received(model, example)
    except Exception as error:
        if example_input is not None:
            raise TraceError(f"{type(model).__name__}: the forward pass fails on {example}: {error}") from error
        log.debug("verify: %s does not run on %s: %r", type(model).__name__, example, error)
        return {}


def _random(example: Example) -> Example:
    """Numbers in place of whatever the memory of an example held; the global random state stays."""
    with torch.random.fork_rng(devices=[]):
        return example.filled(lambda t: torch.rand_like(t) if t.is_floating_point() else t)
