"""bake(model): the zeros are written into plain modules; verify(model): every group holds at most N non-zeros."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from nmfx.errors import VerificationError
from nmfx.graph.census import find_sites
from nmfx.graph.masked import deep_copy, masked_sites, renew, unmask
from nmfx.passes.transform import AnyScheme, resolve_scheme
from nmfx.sparsity.mask import check_groups


def bake(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """A copy of a converted model in plain modules of the original classes, with real zeros and no masks."""
    result = model if inplace else deep_copy(model)
    renew(result)
    for module in result.modules():
        unmask(module, keep_masked=True)
    return result


@dataclass(frozen=True)
class Verified:
    """What `verify` counted: sites and groups checked, weights in them, and non-zeros found."""

    sites: int
    groups: int
    weights: int
    nonzeros: int


def verify(model: nn.Module, scheme: AnyScheme | None = None, *, example_input: Any = None) -> Verified:
    """Check that every group of every sparse site holds at most N non-zeros, as the model reads them now.

    Args:
        scheme: needed for plain (baked) models; a converted model carries its own.

    Raises:
        VerificationError: naming the first group that holds more, or a model with nothing to verify.
    """
    renew(model)
    checks = {}
    if scheme is None:
        for masked in masked_sites(model):
            value = getattr(masked.owner, masked.attr)
            checks[masked.spec.name] = (value, masked.spec.pattern.n, masked.spec.grouping)
        if not checks:
            raise VerificationError(f"{type(model).__name__}: nothing is masked; give the scheme it should obey")
    else:
        sites = find_sites(model, example_input)
        resolved = resolve_scheme(scheme, sites)
        for name, pattern in resolved.items():
            path, attr = sites[name].owners[0]
            checks[name] = (getattr(model.get_submodule(path), attr), pattern.n, resolved.grouping(sites[name]))
    groups = sum(check_groups(name, weight, n, grouping) for name, (weight, n, grouping) in checks.items())
    weights = sum(weight.numel() for weight, _, _ in checks.values())
    return Verified(len(checks), groups, weights, sum(int(weight.count_nonzero()) for weight, _, _ in checks.values()))
