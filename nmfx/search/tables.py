"""Numbers read off the weights, a site at a time: what every option loses, and Domino's tipping points."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from nmfx.errors import SearchError
from nmfx.models.site import weight_of
from nmfx.passes.calibration import Calibration, explain_failure, score_evidence
from nmfx.passes.thresholds import shared_squares, sorted_magnitudes, thresholds_attached, thresholds_of
from nmfx.search.problem import Problem
from nmfx.search.trial import Trial
from nmfx.settings.methods import SENSITIVITIES, resolve
from nmfx.settings.search import QUANTILE
from nmfx.sparsity.mask import make_mask
from nmfx.sparsity.pattern import Pattern

Table = list[list[float]]  # sites x options, 0 for dense; lower is better


@dataclass(frozen=True)
class Tables:
    """The tables of one problem on one model's weights; each is computed when first asked for, and once.

    ``sensitivity`` names the table that `losses` is (see `nmfx.settings.methods`), ``score`` what the masks rank weights by;
    those that look at pictures need `calibration`.
    """

    problem: Problem
    model: nn.Module
    sensitivity: str = "weight"
    calibration: Calibration | None = None
    score: str = "magnitude"

    @cached_property
    def losses(self) -> Table:
        """Loss increase of each option of each site, as the chosen sensitivity has it: what a knapsack minimises."""
        return self.squared_errors if self.sensitivity == "weight" else self.table(self.sensitivity)

    def table(self, sensitivity: str) -> Table:
        """The table of a sensitivity, computed anew.

        Raises:
            SearchError: it looks at pictures or labels, and there are none.
        """
        needs = SENSITIVITIES[sensitivity]
        if not needs.pictures:
            return resolve(needs.function)(self)  # type: ignore[no-any-return]
        if self.calibration is None:
            raise SearchError(f"sensitivity {sensitivity!r} looks at pictures: give data= (--data), or use 'weight'")
        if needs.labels:
            self.calibration.need_labels(f"sensitivity {sensitivity!r}")
        with explain_failure(self.model):
            return resolve(needs.function)(self)  # type: ignore[no-any-return]

    @cached_property
    def squared_errors(self) -> Table:
        """The sensitivity ``weight``, which every result is compared by."""
        return self.table("weight")

    def zeros(self) -> Table:
        """A table to fill in."""
        return [[0.0] * len(options) for options in self.problem.options]

    @property
    def pictures(self) -> Calibration:
        """The batches to look at, for those that cannot be without."""
        assert self.calibration is not None  # as their entries say
        return self.calibration

    @cached_property
    def evidence(self) -> Mapping[str, Tensor]:
        """What the score needs beside the weights, by site name."""
        names = [self.problem.sites.sites[i].name for i in self.problem.free]
        return score_evidence(self.model, self.problem.sites, self.score, self.calibration, names)

    def dropped(self, model: nn.Module) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """``(site, option, weight, mask of what the option drops)`` of every option that drops anything, of this copy."""
        for i in self.problem.free:
            site = self.problem.sites.sites[i]
            weight, evidence = weight_of(model, site).detach(), self.evidence.get(site.name)
            for option, pattern in enumerate(self.problem.options[i][:-1]):
                mask = make_mask(weight, pattern.n, self.problem.grouping(i, pattern), self.score, evidence)
                yield i, option, weight, ~mask

    def trial(self) -> Trial:
        """A copy of the model to try schemes on."""
        return Trial(self.problem, self.model, self.pictures, self.score, self.evidence)

    @cached_property
    def energy(self) -> float:
        """Sum of all squared weights of the sites with a choice."""
        weights = (weight_of(self.model, self.problem.sites.sites[index]) for index in self.problem.free)
        return sum(float(weight.detach().float().square().sum()) for weight in weights)

    @cached_property
    def tipping_points(self) -> list[list[float]]:
        """Shrinkage ``S`` at which a site steps from n to n - 1, for n = M .. 2 in this order (domino.md, section 5).

        ``a_n exp(-S) <= T_g`` must hold in 75 % of the groups: the quantile of ``log(a_n / T_g)``, from zero, non-decreasing
        as n falls. The thresholds ``T_g`` are attached to the model meanwhile. Empty for sites without a choice.
        """
        with thresholds_attached(self.model, self.problem.sites, self.problem.groupings, self.problem.starts):
            return self._tipping_points()

    def _tipping_points(self) -> list[list[float]]:
        points: list[list[float]] = [[] for _ in self.problem.options]
        for index in self.problem.free:
            ordered = self.magnitudes(index, self.problem.options[index][0])
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

    def squares(self, index: int, pattern: Pattern) -> Tensor:
        """Squared weights of a site at each rank of its groups, ``(m,)`` (see `shared_squares`); errors as of `magnitudes`."""
        ordered = self.magnitudes(index, pattern)
        if pattern.vector == 1:  # sorted already
            return ordered.square_().sum(dim=1, dtype=torch.float64)
        site = self.problem.sites.sites[index]
        return shared_squares(weight_of(self.model, site), self.problem.grouping(index, pattern))

    def magnitudes(self, index: int, pattern: Pattern) -> Tensor:
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
