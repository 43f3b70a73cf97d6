"""New values for one weight, or for some of its columns: damped more until held-back pictures agree, or left as they were."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nmfx.masking.weight import MaskSpec
from nmfx.passes.samples import Product
from nmfx.sparsity.correction import CORRECTIONS, FEW, Moments, Quadratic, Scaled, Selection, fit_kept
from nmfx.sparsity.layout import Grouping
from nmfx.sparsity.mask import update_mask

DAMPINGS = (0.01, 0.1, 1.0)  # tried in this order until the held-back pictures agree with the others
AGREE = 1.25  # how much larger the error on held-back pictures may be
EXACT = 1e-6  # an error that is rounding

Solver = Callable[[Quadratic], Tensor]


@dataclass(frozen=True)
class Fit:
    """What was found.

    Attributes:
        weight: ``(groups, rows, columns)``, float32.
        damping: with which; None if the weight is as it was.
        before, after: errors on the held-back samples, as `Moments.error` gives them.
    """

    weight: Tensor
    damping: float | None
    before: float
    after: float


def fit(moments: tuple[Moments, Moments], start: Tensor, dense: Tensor, solver: Solver) -> Fit:
    """The best values that `solver` finds for any damping, or `start` if the held-back samples say so.

    Args:
        moments: of the samples to fit on, and of those held back, which teach as well once they have judged.
        start, dense: the values as they are and the dense ones, ``(groups, rows, columns)``.
        solver: the damped loss -> values; float32.
    """
    fitted, held = moments
    before = after = held.error(start)
    if before < EXACT:
        return Fit(start, None, before, before)
    best, used, scaled = start, None, Scaled(fitted)
    for damping in DAMPINGS:
        found = solver(Quadratic.of(scaled, dense, damping))
        error = held.error(found)
        if error < after:
            best, used, after = found, damping, error
        if error <= AGREE * fitted.error(found):
            break
    if used is not None:
        problem = Quadratic.of(Scaled(fitted + held), dense, used)
        best = fit_kept(problem, best != 0, best, steps=FEW).float()
    return Fit(best, used, before, after)


def solve(
    method: str,
    problem: Quadratic,
    dense: Tensor,
    product: Product,
    whole: Tensor,
    spec: MaskSpec,
    columns: slice | None = None,
) -> Tensor:
    """The values that a method finds for what a product reads of a masked weight.

    Args:
        method: one of `CORRECTIONS`.
        problem: the loss to make small.
        dense: the dense values, ``(groups, rows, columns)``.
        product: reads `whole`, or a part of it.
        whole: the weight.
        spec: pattern and groups of the whole weight.
        columns: which ones `problem` and `dense` are about, one of `blocks_of`; by default all.

    Returns:
        ``(groups, rows, columns)``, float32.
    """
    grouping, (vector, run) = spec.grouping, (spec.grouping.vector, spec.grouping.run[0])
    if columns is not None:
        count, width = product.groups * product.rows, columns.stop - columns.start
        grouping = Grouping((count, width, 1), grouping.m, vector=vector, outputs=(run, width))
        spans = [(start, min(start + grouping.m, width)) for start in range(0, width, grouping.m)]
        selection = Selection(spec.pattern.n, spans, lambda scores: _mask(scores, spec.pattern.n, grouping), vector, run)
        return CORRECTIONS[method](problem, dense, selection).float()

    view = product.weight
    place = view.shape, view.stride(), view.storage_offset() - whole.storage_offset()
    apart = _apart(product, spec)
    fixed = apart and view.numel() < whole.numel()  # it shares with rows that another product reads: its mask stays

    def choose(scores: Tensor) -> Tensor:  # a product may read a part of a weight: groups are those of the whole
        full = whole
        if not fixed:
            full = torch.zeros(whole.shape, dtype=scores.dtype, device=whole.device)
            full.as_strided(*place).copy_(product.tensor(scores))
        return product.matrix(_mask(full, spec.pattern.n, grouping).as_strided(*place))

    positions, inputs = product.columns
    spans = [
        (position * inputs + start, position * inputs + min(start + grouping.m, inputs))
        for position in range(positions)
        for start in range(0, inputs, grouping.m)
    ]
    selection = Selection(spec.pattern.n, () if apart or grouping.flat else spans, choose, vector, run)
    return CORRECTIONS[method](problem, dense, selection).float()


def blocks_of(product: Product, spec: MaskSpec | None, most: int) -> list[slice]:
    """All columns in blocks of at most `most`, each of whole groups, of which only its last may be short.

    Empty where groups cross rows, or rows share a mask that are not all at hand.
    """
    (positions, inputs), m = product.columns, 1 if spec is None else spec.grouping.m
    if spec is not None and (_apart(product, spec) or spec.grouping.flat):
        return []
    runs, length = (1, positions * inputs) if inputs % m == 0 else (positions, inputs)
    step = max(1, most // m) * m
    return [
        slice(run * length + start, run * length + min(start + step, length))
        for run in range(runs)
        for start in range(0, length, step)
    ]


def _apart(product: Product, spec: MaskSpec) -> bool:
    """Whether rows that share a mask are not all in the same product."""
    return spec.grouping.vector > 1 and product.rows % spec.grouping.run[0] != 0


def _mask(scores: Tensor, n: int, grouping: Grouping) -> Tensor:
    """`make_mask`, without its sort."""
    scores = scores.contiguous()
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    update_mask(scores, n, grouping, mask, torch.empty_like(scores))
    return mask
