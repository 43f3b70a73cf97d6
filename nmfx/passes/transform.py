"""transform(model, scheme): the owners of the scheme's weights are swapped for masked equivalents."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nmfx.errors import SchemeError
from nmfx.masking.copies import deep_copy
from nmfx.masking.modes import keep_modes
from nmfx.masking.owner import is_masked, mask_attribute, unmask_model
from nmfx.masking.sites import masked_sites, note_masked
from nmfx.masking.weight import MaskSpec
from nmfx.models.census import find_sites
from nmfx.models.example import Example
from nmfx.models.site import Site, Sites
from nmfx.models.tracer import to_graph
from nmfx.passes.calibration import Calibration, score_evidence
from nmfx.scheme import Scheme, fit
from nmfx.sparsity.layout import Grouping
from nmfx.sparsity.pattern import Pattern
from nmfx.sparsity.rules import resolve_rule

AnyScheme = Scheme | str | Pattern | Path | Mapping[str, str | Pattern]


def transform(
    model: nn.Module,
    scheme: AnyScheme,
    *,
    example_input: Any = None,
    sites: Sites | None = None,
    training: str = "sr-ste",
    decay: float | None = None,
    score: str = "magnitude",
    data: Iterable[Any] | None = None,
    as_graph: bool = False,
    inplace: bool = False,
) -> nn.Module:
    """A converted copy of `model`: its own class, its own state-dict keys, every weight of the scheme read through its mask.

    Args:
        scheme: a `Scheme`, a pattern (``"2:4"``, or ``"2:4x4"`` for one mask of 4 rows: every site that can take it), a mapping
            from site names or globs to patterns, or the path of a scheme file.
        example_input: what the forward pass takes (see `find_sites`); ignored when `sites` are given.
        training: one of `nmfx.sparsity.rules.RULES`, how gradients reach dropped weights. ``sr-ste`` and ``ste`` give the dense
            gradient and let the masks follow the weights; ``fixed`` keeps today's masks and trains kept weights only (ASP).
        decay: SR-STE's factor on dropped weights; None is the rule's own (Zhou et al., 2021: 2e-4; DominoSearch's 80 % recipe:
            5e-4). Every ``step`` of an optimiser of torch.optim updates with ``grad + decay * (1 - mask) * weight``, once,
            after any scaling, accumulation, averaging and clipping; ``weight.grad`` stays the gradient of the loss. A loop
            without an optimiser calls `nmfx.pull` before it updates.
        score: what a mask ranks the weights of a group by, one of `nmfx.sparsity.score.SCORES`: ``magnitude``, ``input-norm``
            (Wanda) or ``gradient`` (Fisher). What it needs is measured once, on the dense weights, and stays.
        data: batches ``(input, label)`` for a score that looks at pictures; ``input-norm`` needs no labels.
        as_graph: return the fx view of the converted model instead (see `to_graph`).
        inplace: convert `model` itself, without a copy.

    Returns:
        The converted model in the mode of `model`. Sites with a dense pattern are not touched at all. A model that is converted
        already is converted anew from its dense weights.

    Raises:
        NmfxError: no such training rule, or a decay out of range.
        SearchError: no such score, or no batches for one that needs them.
        SchemeError: the scheme does not fit, naming the site, its shape, and what to do.
        TraceError: the forward pass fails on the example input.
    """
    rule = resolve_rule(training, decay)
    sites = sites if sites is not None else find_sites(model, example_input)
    resolved = resolve_scheme(scheme, sites)
    resolved.check(sites)
    calibration = None if data is None else Calibration.of(data)
    evidence = score_evidence(model, sites, score, calibration, [site.name for site in sites if site.name in resolved])
    result = model if inplace else deep_copy(model)
    unmask_model(result, keep_masked=False)
    try:
        for site in sites:
            if site.name in resolved:
                pattern, grouping = resolved[site.name], resolved.grouping(site)
                spec = MaskSpec(site.name, pattern, grouping, rule.decay, rule.frozen, site.derived, score)
                _mask(result, site, spec, evidence.get(site.name))
    except Exception:
        unmask_model(result, keep_masked=False)
        raise
    note_masked(result, resolved)
    return to_graph(result, example_input) if as_graph else result


def _mask(model: nn.Module, site: Site, spec: MaskSpec, evidence: Tensor | None = None) -> None:
    twin = None
    for path, attr in site.owners:
        mask_attribute(model.get_submodule(path), attr, spec, twin, evidence)
        twin = twin or (model.get_submodule(path), attr)


def resolve_scheme(scheme: AnyScheme, sites: Sites) -> Scheme:
    """Whatever `transform` takes for a scheme, as a `Scheme` for these sites.

    Raises:
        SchemeError: it is none of these things, or does not fit the sites.
    """
    if isinstance(scheme, Scheme):
        return scheme
    if isinstance(scheme, Pattern) or (isinstance(scheme, str) and re.fullmatch(r"\s*\d+\s*:\s*\d+\s*(x\s*\d+\s*)?", scheme)):
        pattern = Pattern(scheme)
        if not len(sites):
            left = "".join(f"; {skipped.name} is skipped: {skipped.reason}" for skipped in sites.skipped[:3])
            raise SchemeError(f"{sites.model or 'the model'} has no sites: no weight of a convolution, linear or matmul{left}")
        uniform = Scheme.uniform(sites, pattern)
        if not uniform and not pattern.is_dense:
            reasons = sorted({reason for site in sites if (reason := fit(site, pattern)[1])})
            raise SchemeError(f"{pattern} fits none of the {len(sites)} sites: {'; '.join(reasons[:4])}")
        return uniform
    if isinstance(scheme, str | Path):
        return Scheme.load(scheme, sites)
    if isinstance(scheme, Mapping):
        return Scheme.from_rules(sites, scheme)
    raise SchemeError(f"expected a Scheme, a pattern such as '2:4', a mapping or a path, got {type(scheme).__name__}")


@torch.no_grad()
def conversion_difference(model: nn.Module, sites: Sites, example: Example) -> float:
    """Largest difference between `model` in eval mode and itself with every site read through an all-ones mask; 0 is exact.

    It proves the swap on this very model: classes change, reads go through the masks, and nothing else happens. The model gets
    its own classes back.
    """
    if any(is_masked(module) for module in model.modules()):
        raise SchemeError(f"{type(model).__name__} is converted already; compare its baked copy")

    def outputs() -> list[Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            leaves = tree_leaves(model(*example.args, **example.kwargs))
        return [leaf.detach().double() for leaf in leaves if isinstance(leaf, Tensor)]

    with keep_modes(model):
        model.eval()
        try:
            before = outputs()
            for site in sites:
                _mask(model, site, MaskSpec(site.name, Pattern.DENSE, Grouping(site.rows, 1), derived=site.derived))
            after = outputs()
        finally:
            unmask_model(model, keep_masked=False)
    if [t.shape for t in before] != [t.shape for t in after]:
        return float("inf")
    return max((_difference(a, b) for a, b in zip(before, after, strict=True) if a.numel()), default=0.0)


def _difference(a: Tensor, b: Tensor) -> float:
    """Largest difference; the same infinity or NaN on both sides is none, on one side it is infinite."""
    same = (a == b) | (a.isnan() & b.isnan())
    return float(torch.where(same, 0.0, (a - b).abs()).nan_to_num(nan=float("inf")).max())


def scheme_of(model: nn.Module) -> Scheme:
    """The scheme that a converted model carries (empty for a plain one)."""
    specs = {site.spec.name: site.spec for site in masked_sites(model)}
    layout: Literal["strict", "flat"] = "flat" if any(spec.grouping.flat for spec in specs.values()) else "strict"
    short = any(len(spec.grouping.sizes) > 1 or spec.grouping.m > spec.grouping.lines[1] for spec in specs.values())
    return Scheme({name: spec.pattern for name, spec in specs.items()}, layout, short)
