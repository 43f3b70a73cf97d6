"""New values for the kept weights of one site, and the mask chosen with them, from second moments of what the site reads.

A site is ``groups`` matrices of ``rows`` outputs and ``columns`` inputs (those of a convolution are its kernel positions, input
channels within them consecutive, so that N:M groups are too). With inputs X and the dense network's outputs Y,

    loss(W) = (|X W' - Y|^2 + damping * |(W - W_dense) D|^2) / samples,  D^2 = diag(X'X),

whose weights without a mask are ``W_0 = (Y'X + d W_dense D^2) (X'X + d D^2)^-1``, and
``loss(W) - loss(W_0) = (W - W_0) H (W - W_0)'``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nmfx.sparsity.layout import Grouping
from nmfx.sparsity.mask import make_mask, top_mask

FEW = 15  # steps of conjugate gradients from weights that are nearly the best; more change the loss by less than 0.01 %
LEAST_SQUARE = 1e-3  # of a column, as a share of the mean one's: it is damped as if it had that


@dataclass(frozen=True)
class Selection:
    """Which weights of a site may be kept.

    Attributes:
        n: how many in a group.
        spans: ``(start, end)`` of the columns of each group, in order; empty where groups cross rows (the flat
            layout), or where rows that share are not all at hand.
        choose: scores ``(groups, rows, columns)`` -> bool mask of that shape, the `n` largest of every group, or the largest
            sums over rows that share a mask.
        vector, run: so many adjacent rows share, out of every `run` rows (see `Grouping`).
    """

    n: int
    spans: Sequence[tuple[int, int]]
    choose: Callable[[Tensor], Tensor]
    vector: int = 1
    run: int = 1

    def nearest(self, values: Tensor) -> Tensor:
        """The mask whose dropped `values` have the least sum of squares; one row alone has it by magnitude."""
        return self.choose(values.abs() if self.vector == 1 else values.square())

    def top(self, scores: Tensor) -> Tensor:
        """The `n` largest of ``(groups, rows, columns of one span)``, as `choose` does for all spans."""
        if self.vector == 1:
            return top_mask(scores, self.n, dim=-1)
        groups, rows, width = scores.shape
        span = Grouping((groups * rows, width, 1), width, vector=self.vector, outputs=(self.run, width))
        return make_mask(scores, self.n, span)


@dataclass
class Moments:
    """Sums over samples of what one site reads and of what it should give, both less a constant that is near their mean.

    Attributes:
        origin: those constants, ``(groups, 1, columns)`` and ``(groups, 1, rows)``.
        inputs: ``X'X``, ``(groups, columns, columns)``.
        targets: ``Y'X``, ``(groups, rows, columns)``.
        input_sum, target_sum: sums of X and Y, shaped as `origin`.
        energy: sum of the squares of Y.
        samples: how many.
    """

    origin: tuple[Tensor, Tensor]
    inputs: Tensor
    targets: Tensor
    input_sum: Tensor
    target_sum: Tensor
    energy: float = 0.0
    samples: int = 0

    @staticmethod
    def at(x: Tensor, y: Tensor, *, centre: bool) -> Moments:
        """Of no samples yet; shaped for `x` and `y`, around their means if they are to be `centred`."""
        origin = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
        if not centre:
            origin = torch.zeros_like(origin[0]), torch.zeros_like(origin[1])
        groups, _, columns = x.shape
        inputs, targets = x.new_zeros(groups, columns, columns), x.new_zeros(groups, y.shape[2], columns)
        return Moments(origin, inputs, targets, torch.zeros_like(origin[0]), torch.zeros_like(origin[1]))

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add samples: `x` ``(groups, samples, columns)``, `y` ``(groups, samples, rows)``, float32."""
        x, y = x - self.origin[0], y - self.origin[1]
        self.inputs.baddbmm_(x.mT, x)
        self.targets.baddbmm_(y.mT, x)
        self.input_sum += x.sum(1, keepdim=True)
        self.target_sum += y.sum(1, keepdim=True)
        self.energy += float(y.square().sum(dtype=torch.float64))
        self.samples += x.shape[1]

    def __add__(self, other: Moments) -> Moments:
        """Of both; they have the same origin."""
        return Moments(
            self.origin,
            self.inputs + other.inputs,
            self.targets + other.targets,
            self.input_sum + other.input_sum,
            self.target_sum + other.target_sum,
            self.energy + other.energy,
            self.samples + other.samples,
        )

    def centred(self) -> Moments:
        """The same of samples less their means: what is left to fit where outputs may move by a constant."""
        count = max(1, self.samples)
        x, y = self.input_sum, self.target_sum
        energy = self.energy - float(y.square().sum(dtype=torch.float64)) / count
        inputs, targets = self.inputs - x.mT @ x / count, self.targets - y.mT @ x / count
        return Moments(self.means, inputs, targets, torch.zeros_like(x), torch.zeros_like(y), max(0.0, energy), self.samples)

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """Of X and Y, ``(groups, 1, columns)`` and ``(groups, 1, rows)``."""
        count = max(1, self.samples)
        return self.origin[0] + self.input_sum / count, self.origin[1] + self.target_sum / count

    def error(self, weight: Tensor) -> float:
        """``|X W' - Y|^2 / |Y|^2`` of weights ``(groups, rows, columns)``."""
        weight = weight.to(self.inputs.dtype)
        product = (weight @ self.inputs - 2 * self.targets) * weight
        error = (float(product.sum(dtype=torch.float64)) + self.energy) / max(self.energy, 1e-30)
        return max(0.0, error) if math.isfinite(error) else math.inf


class Scaled:
    """Second moments of the inputs, each column by its root mean square; their factors serve every pattern.

    Attributes:
        scale: those roots, ``(groups, 1, columns)``; float64 where decompositions are cheap.
        curvature: ``X'X / samples`` of scaled inputs, ``(groups, columns, columns)``.
    """

    def __init__(self, moments: Moments) -> None:
        dtype = torch.float64 if moments.inputs.shape[-1] <= 1024 else torch.float32
        curvature = moments.inputs.to(dtype) / max(1, moments.samples)
        squares = curvature.diagonal(dim1=-2, dim2=-1)
        floor = LEAST_SQUARE * squares.mean(-1, keepdim=True).clamp_min(1e-12)
        self.scale = squares.clamp_min(0).add(floor).sqrt().unsqueeze(-2)
        self.curvature = curvature / (self.scale * self.scale.mT)
        self.moments = moments

    def factor(self, shift: float) -> Tensor:
        """The lower Cholesky factor of ``curvature + shift``, ``(groups, columns, columns)``."""
        raised = self.curvature.clone()
        raised.diagonal(dim1=-2, dim2=-1).add_(shift)
        factor: Tensor = torch.linalg.cholesky(raised)
        return factor


@dataclass(frozen=True)
class Quadratic:
    """The damped loss of one site, per sample: ``(W - optimum) curvature (W - optimum)'`` above that of `optimum`.

    Attributes:
        curvature: ``(groups, columns, columns)``.
        linear: ``optimum @ curvature``, ``(groups, rows, columns)``.
        scaled, damping: what they were made of.
    """

    curvature: Tensor
    linear: Tensor
    scaled: Scaled
    damping: float

    @staticmethod
    def of(scaled: Scaled, dense: Tensor, damping: float) -> Quadratic:
        """Damped towards the weights `dense` ``(groups, rows, columns)``: `damping` is added to each scaled column's square."""
        moments, squares = scaled.moments, scaled.scale.square()
        curvature = scaled.curvature * (scaled.scale * scaled.scale.mT)
        curvature.diagonal(dim1=-2, dim2=-1).add_(damping * squares.squeeze(-2))
        linear = moments.targets.to(curvature.dtype) / max(1, moments.samples) + damping * squares * dense.to(curvature.dtype)
        return Quadratic(curvature, linear, scaled, damping)

    @property
    def optimum(self) -> Tensor:
        """The dense weights of the least loss, ``(groups, rows, columns)``."""
        scale = self.scaled.scale
        return torch.cholesky_solve((self.linear / scale).mT, self.scaled.factor(self.damping)).mT / scale


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
    """ADMM between the loss and the set of N:M weights, then `fit_kept` (ALPS, Meng et al., NeurIPS 2024, algorithm 1).

    Columns are scaled by the root of their mean square, so that the projection keeps what matters to the output. The penalty
    grows by the same factor after every third step, until the mask stays: each value of it takes one Cholesky factorisation.
    """
    scale, linear = problem.scaled.scale, problem.linear / problem.scaled.scale
    optimum = problem.optimum * scale
    kept = optimum * selection.nearest(optimum)
    mask, dual, rho = kept != 0, torch.zeros_like(kept), 0.1
    factor = problem.scaled.factor(problem.damping + rho)
    for step in range(1, steps + 1):
        weight = torch.cholesky_solve((linear + rho * kept - dual).mT, factor).mT
        proposal = weight + dual / rho
        found = selection.nearest(proposal)
        kept = proposal * found
        dual = dual + rho * (weight - kept)
        if step % 3 == 0:
            if torch.equal(found, mask):
                break
            rho, mask = 1.2 * rho, found
            factor = problem.scaled.factor(problem.damping + rho)
    return fit_kept(problem, selection.nearest(kept), kept / scale, steps=FEW)


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
        mask[..., start:end] = selection.top(scores)
        for column in range(start, end):
            lost = torch.where(mask[..., column], 0.0, weight[..., column]) / diagonal[:, None, column]  # groups, rows
            weight[..., column:] -= lost.unsqueeze(-1) * factor[:, None, column, column:]
    return fit_kept(problem, mask, weight)


CORRECTIONS: dict[str, Callable[[Quadratic, Tensor, Selection], Tensor]] = {
    "admm": by_admm,
    "sweep": by_sweep,
    "magnitude": by_magnitude,
}
