"""New values for the kept weights of one site, and the mask chosen with them, from second moments of what the site reads.

A site is ``groups`` matrices of ``rows`` outputs and ``columns`` inputs (those of a convolution are its kernel positions, input
channels within them consecutive, so that N:M groups are too). With inputs X and the dense network's outputs Y,

    loss(W) = (|X W' - Y|^2 + damping * mean diag(X'X) * |W - W_dense|^2) / samples,

whose weights without a mask are ``W_0 = (Y'X + d W_dense) (X'X + d)^-1``, and ``loss(W) - loss(W_0) = (W - W_0) H (W - W_0)'``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nmfx.sparsity.mask import top_mask


@dataclass(frozen=True)
class Selection:
    """Which weights of a site may be kept.

    Attributes:
        n: how many in a group.
        spans: ``(start, end)`` of the columns of each group, in order; empty where groups cross rows (the flat layout).
        choose: scores ``(groups, rows, columns)`` -> bool mask of that shape, the `n` largest of every group.
    """

    n: int
    spans: Sequence[tuple[int, int]]
    choose: Callable[[Tensor], Tensor]


@dataclass
class Moments:
    """Sums over samples of what one site reads and of what it should give.

    Attributes:
        inputs: ``X'X``, ``(groups, columns, columns)``.
        targets: ``Y'X``, ``(groups, rows, columns)``.
        energy: sum of the squares of Y.
        samples: how many.
    """

    inputs: Tensor
    targets: Tensor
    energy: float = 0.0
    samples: int = 0

    @staticmethod
    def zeros(groups: int, rows: int, columns: int, *, device: torch.device | None = None) -> Moments:
        """Of no samples yet."""
        how: dict[str, Any] = {"dtype": torch.float32, "device": device}
        return Moments(torch.zeros(groups, columns, columns, **how), torch.zeros(groups, rows, columns, **how))

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add samples: `x` ``(groups, samples, columns)``, `y` ``(groups, samples, rows)``, float32."""
        self.inputs.baddbmm_(x.mT, x)
        self.targets.baddbmm_(y.mT, x)
        self.energy += float(y.square().sum(dtype=torch.float64))
        self.samples += x.shape[1]

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.inputs + other.inputs,
            self.targets + other.targets,
            self.energy + other.energy,
            self.samples + other.samples,
        )

    def error(self, weight: Tensor) -> float:
        """``|X W' - Y|^2 / |Y|^2`` of weights ``(groups, rows, columns)``."""
        weight = weight.to(self.inputs.dtype)
        product = (weight @ self.inputs - 2 * self.targets) * weight
        error = (float(product.sum(dtype=torch.float64)) + self.energy) / max(self.energy, 1e-30)
        return max(0.0, error) if math.isfinite(error) else math.inf


@dataclass(frozen=True)
class Quadratic:
    """The damped loss of one site, per sample: ``(W - optimum) curvature (W - optimum)'`` above that of `optimum`."""

    curvature: Tensor  # (groups, columns, columns)
    linear: Tensor  # (groups, rows, columns): optimum @ curvature

    @staticmethod
    def of(moments: Moments, dense: Tensor, damping: float) -> Quadratic:
        """Damped towards the dense weights `dense` by a share of the mean square of the inputs; float64 where that is cheap."""
        dtype = torch.float64 if moments.inputs.shape[-1] <= 1024 else torch.float32
        curvature = moments.inputs.to(dtype) / max(1, moments.samples)
        diagonal = curvature.diagonal(dim1=-2, dim2=-1)
        added = damping * diagonal.mean(dim=-1, keepdim=True).clamp_min(1e-12)  # groups, 1
        linear = moments.targets.to(dtype) / max(1, moments.samples) + added.unsqueeze(-1) * dense.to(dtype)
        curvature.diagonal(dim1=-2, dim2=-1).add_(added)
        return Quadratic(curvature, linear)

    @property
    def optimum(self) -> Tensor:
        """The dense weights of the least loss, ``(groups, rows, columns)``."""
        factor = torch.linalg.cholesky(self.curvature)
        return torch.cholesky_solve(self.linear.mT, factor).mT


def fit_kept(problem: Quadratic, mask: Tensor, start: Tensor, *, steps: int = 40, tolerance: float = 1e-6) -> Tensor:
    """The weights of the least loss among those that are zero outside `mask`: conjugate gradients on all rows at once.

    Preconditioned by the diagonal.

    Args:
        problem: the loss, of ``(groups, rows, columns)`` weights.
        mask: which of them are kept: bool, of that shape.
        start: weights to start from, of that shape.
        steps: at most.
        tolerance: a row stops when its gradient has fallen by that factor.

    Returns:
        The weights, in the dtype of the loss.
    """
    keep = mask.to(problem.curvature.dtype)
    weight = start.to(keep.dtype) * keep
    scale = 1 / problem.curvature.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
    residual = (problem.linear - weight @ problem.curvature) * keep
    move = preconditioned = residual * scale
    size = (residual * preconditioned).sum(-1, keepdim=True)
    enough = size * tolerance**2
    for _ in range(steps):
        if bool((size <= enough).all()):
            break
        change = (move @ problem.curvature) * keep
        length = size / (move * change).sum(-1, keepdim=True).clamp_min(1e-300 if keep.dtype == torch.float64 else 1e-30)
        weight = weight + length * move
        residual = residual - length * change
        preconditioned = residual * scale
        before, size = size, (residual * preconditioned).sum(-1, keepdim=True)
        move = preconditioned + size / before.clamp_min(1e-300 if keep.dtype == torch.float64 else 1e-30) * move
    return weight


def by_magnitude(problem: Quadratic, dense: Tensor, selection: Selection) -> Tensor:
    """The mask of the largest dense weights, its kept weights fitted."""
    return fit_kept(problem, selection.choose(dense.abs()), dense)


def by_admm(problem: Quadratic, dense: Tensor, selection: Selection, *, steps: int = 100) -> Tensor:
    """ADMM between the loss and the set of N:M weights, one eigendecomposition for all steps, then `fit_kept` (ALPS, Meng et
    al., NeurIPS 2024, algorithm 1). Columns are scaled by the root of their mean square, so that the projection keeps what
    matters to the output.
    """
    scale = problem.curvature.diagonal(dim1=-2, dim2=-1).sqrt().unsqueeze(-2)  # groups, 1, columns
    curvature = problem.curvature / (scale * scale.mT)
    linear = problem.linear / scale
    values, vectors = torch.linalg.eigh(curvature)
    rotated = linear @ vectors  # groups, rows, columns
    values = values.clamp_min(0).unsqueeze(-2)
    optimum = (rotated / values.clamp_min(1e-12)) @ vectors.mT
    kept = optimum * selection.choose(optimum.abs())
    mask, dual, rho = kept != 0, torch.zeros_like(kept), 0.1
    for step in range(steps):
        weight = ((rotated + (rho * kept - dual) @ vectors) / (values + rho)) @ vectors.mT
        proposal = weight + dual / rho
        found = selection.choose(proposal.abs())
        kept = proposal * found
        dual = dual + rho * (weight - kept)
        if step % 3 == 2:
            changed = float((found ^ mask).sum()) / max(1.0, float(found.sum()))
            if changed == 0:
                break
            rho *= 1.3 if changed > 0.1 else 1.2 if changed > 0.005 else 1.1
            mask = found
    return fit_kept(problem, selection.choose(kept.abs()), kept / scale)


def by_sweep(problem: Quadratic, dense: Tensor, selection: Selection) -> Tensor:
    """One sweep over the columns: of each group the N weights are kept whose loss would cost the most, and what the others
    leave is passed on to later columns (SparseGPT, Frantar & Alistarh, ICML 2023); then `fit_kept`.
    """
    weight = problem.optimum.clone()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(problem.curvature))
    factor = torch.linalg.cholesky(inverse, upper=True)  # groups, columns, columns
    diagonal = factor.diagonal(dim1=-2, dim2=-1)
    mask = selection.choose((weight / diagonal.unsqueeze(-2)).square())  # where groups cross rows; otherwise chosen on the way
    for start, end in selection.spans:
        scores = (weight[..., start:end] / diagonal[:, None, start:end]).square()
        mask[..., start:end] = top_mask(scores, selection.n, dim=-1)
        for column in range(start, end):
            lost = torch.where(mask[..., column], 0.0, weight[..., column]) / diagonal[:, None, column]  # groups, rows
            weight[..., column:] -= lost.unsqueeze(-1) * factor[:, None, column, column:]
    return fit_kept(problem, mask, weight)


CORRECTIONS: dict[str, Callable[[Quadratic, Tensor, Selection], Tensor]] = {
    "admm": by_admm,
    "sweep": by_sweep,
    "magnitude": by_magnitude,
}
