"""Numbers read off the weights, a site at a time: squared errors of every option, and Domino's tipping points."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from nmfx.errors import SearchError
from nmfx.passes.scoring import scores_of, sorted_magnitudes, weight_of
from nmfx.search.problem import Problem

QUANTILE = 0.75  # share of a site's groups that must agree before it steps (domino.md, section 4)


def _magnitudes(problem: Problem, model: nn.Module, index: int) -> Tensor:
    """Sorted magnitudes ``(m, groups)`` of a site.

    Raises:
        SearchError: the weight has no data, or is not finite.
    """
    site = problem.sites.sites[index]
    weight = weight_of(model, site)
    if weight.device.type == "meta":
        raise SearchError(f"{site.name}: on the meta device, without values; load weights before the search")
    ordered = sorted_magnitudes(weight, problem.grouping(index))
    if not math.isfinite(float(ordered[0].sum(dtype=torch.float64))):  # the comparators carry a NaN to the top row
        raise SearchError(f"{site.name} {site.shape}: holds infinite or NaN weights; load other weights")
    return ordered


def squared_errors(problem: Problem, model: nn.Module) -> list[list[float]]:
    """Sum of the squared weights that each option drops, for every site; 0 for dense."""
    table = [[0.0] * len(options) for options in problem.options]
    for index in problem.free:
        ordered = _magnitudes(problem, model, index)
        rank_sums = ordered.square_().sum(dim=1, dtype=torch.float64)  # m: energy of the r-th largest
        for option, pattern in enumerate(problem.options[index]):
            table[index][option] = 0.0 if pattern.is_dense else float(rank_sums[pattern.n :].sum())
    return table


def tipping_points(problem: Problem, model: nn.Module) -> list[list[float]]:
    """Shrinkage ``S`` at which a site steps from n to n - 1, for n = M .. 2 in this order (domino.md, section 5).

    ``a_n exp(-S) <= T_g`` must hold in 75 % of the groups: the quantile of ``log(a_n / T_g)``, from zero, non-decreasing as
    n falls. `attach_scores` has put the thresholds ``T_g`` beside the weights. Empty for sites without a choice.
    """
    points: list[list[float]] = [[] for _ in problem.options]
    for index in problem.free:
        ordered = _magnitudes(problem, model, index)
        threshold, _ = scores_of(model, problem.sites.sites[index])
        # A threshold of zero (pruned before) would never be reached: take a millionth of the site's mean magnitude.
        floor = max(float(ordered.mean()) * 1e-6, torch.finfo(ordered.dtype).tiny)
        ratios = ordered.div_(threshold.to(ordered.dtype).clamp_min(floor)).cpu()
        rank = max(1, math.ceil(QUANTILE * ratios.shape[1]))
        highest = 0.0
        for n in range(len(ratios), 1, -1):
            ratio = float(np.partition(ratios[n - 1].numpy(), rank - 1)[rank - 1])  # 15 times faster than kthvalue
            highest = max(highest, math.log(ratio) if ratio > 0 else 0.0)
            points[index].append(highest)
    return points
