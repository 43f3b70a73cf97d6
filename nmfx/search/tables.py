"""Numbers read off the weights, a site at a time: squared errors of every option, and Domino's tipping points."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from nmfx.errors import SearchError
from nmfx.models.site import weight_of
from nmfx.passes.thresholds import sorted_magnitudes, thresholds_of
from nmfx.search.evidence import Evidence, understood
from nmfx.search.problem import Problem
from nmfx.search.sensitivity import SENSITIVITIES, Table
from nmfx.settings.search import QUANTILE
from nmfx.sparsity.pattern import Pattern


@dataclass(frozen=True)
class Tables:
    """The tables of one problem on one model's weights; each is computed when first asked for, and once.

    ``sensitivity`` names the table that `losses` is, see `nmfx.search.sensitivity`; all but ``weight`` need `evidence`.
    """

    problem: Problem
    model: nn.Module
    sensitivity: str = "weight"
    evidence: Evidence | None = None

    @cached_property
    def losses(self) -> Table:
        """Loss increase of each option of each site, as the chosen sensitivity has it: what a knapsack minimises."""
        return self.squared_errors if self.sensitivity == "weight" else self.measured(self.sensitivity)

    def measured(self, sensitivity: str) -> Table:
        """The table of a sensitivity that looks at data.

        Raises:
            SearchError: there is no data.
        """
        if self.evidence is None:
            raise SearchError(f"sensitivity {sensitivity!r} looks at pictures: give data= (--data), or use 'weight'")
        if sensitivity != "activation":
            self.evidence.need_labels(f"sensitivity {sensitivity!r}")
        with understood(self.model):
            return SENSITIVITIES[sensitivity](self.problem, self.model, self.evidence)

    @cached_property
    def squared_errors(self) -> Table:
        """Sum of the squared weights that each option drops, for every site; 0 for dense."""
        table = [[0.0] * len(options) for options in self.problem.options]
        for index in self.problem.free:
            options, energies = self.problem.options[index], dict[int, Tensor]()
            for pattern in options:
                if (
                    not pattern.is_dense and pattern.m not in energies
                ):  # (m,): of the largest of each group, of the second largest, ...
                    energies[pattern.m] = self._magnitudes(index, pattern).square_().sum(dim=1, dtype=torch.float64)
            for option, pattern in enumerate(options):
                table[index][option] = 0.0 if pattern.is_dense else float(energies[pattern.m][pattern.n :].sum())
        return table

    @cached_property
    def energy(self) -> float:
        """Sum of all squared weights of the sites with a choice."""
        weights = (weight_of(self.model, self.problem.sites.sites[index]) for index in self.problem.free)
        return sum(float(weight.detach().float().square().sum()) for weight in weights)

    @cached_property
    def tipping_points(self) -> list[list[float]]:
        """Shrinkage ``S`` at which a site steps from n to n - 1, for n = M .. 2 in this order (domino.md, section 5).

        ``a_n exp(-S) <= T_g`` must hold in 75 % of the groups: the quantile of ``log(a_n / T_g)``, from zero, non-decreasing
        as n falls. The thresholds ``T_g`` are score buffers beside the weights. Empty for sites without a choice.
        """
        points: list[list[float]] = [[] for _ in self.problem.options]
        for index in self.problem.free:
            ordered = self._magnitudes(index, self.problem.options[index][0])
            threshold, _ = thresholds_of(self.model, self.problem.sites.sites[index])
            # A threshold of next to nothing would hardly be reached: take a millionth of the site's mean magnitude.
            floor = max(float(ordered.mean()) * 1e-6, torch.finfo(ordered.dtype).tiny)
            ratios = ordered.div_(threshold.to(ordered.dtype).clamp_min(floor)).cpu()
            rank = max(1, math.ceil(QUANTILE * ratios.shape[1]))
            highest = 0.0
            for n in range(len(ratios), 1, -1):
                ratio = float(np.partition(ratios[n - 1].numpy(), rank - 1)[rank - 1])  # 15 times faster than kthvalue
                highest = max(highest, math.log(ratio) if ratio > 0 else 0.0)
                points[index].append(highest)
        return points

    def _magnitudes(self, index: int, pattern: Pattern) -> Tensor:
        """Sorted magnitudes ``(m, groups)`` of a site.

        Raises:
            SearchError: the weight has no data, or is not finite.
        """
        site = self.problem.sites.sites[index]
        weight = weight_of(self.model, site)
        if weight.device.type == "meta":
            raise SearchError(f"{site.name}: on the meta device, without values; load weights before the search")
        ordered = sorted_magnitudes(weight, self.problem.grouping(index, pattern))
        if not math.isfinite(float(ordered[0].sum(dtype=torch.float64))):  # the comparators carry a NaN to the top row
            raise SearchError(f"{site.name} {site.shape}: holds infinite or NaN weights; load other weights")
        return ordered
