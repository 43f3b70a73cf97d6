"""Whole schemes tried out on a copy of the model: masked, batch norms recalibrated, scored on held-back pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from nmfx.masking.copies import throw_away_copy
from nmfx.models.site import weight_of
from nmfx.passes.calibration import Batch, Calibration
from nmfx.passes.statistics import recalibrate_bn
from nmfx.search.problem import Problem
from nmfx.sparsity.mask import make_mask
from nmfx.sparsity.pattern import Pattern


def loss_on(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Mean cross-entropy of `model`, in the mode it is in."""
    total, count = 0.0, 0
    device = next(model.parameters()).device
    with torch.no_grad():
        for x, label in batches:
            total += float(nn.functional.cross_entropy(model(x.to(device)).float(), label.to(device), reduction="sum"))
            count += len(label)
    return total / count


@dataclass
class Trial:
    """A copy of the model to try schemes on: its weights are masked and put back, its batch statistics re-estimated."""

    problem: Problem
    model: nn.Module
    calibration: Calibration
    score: str = "magnitude"
    evidence: Mapping[str, Tensor] = field(default_factory=dict)  # of the score, by site name

    @cached_property
    def copied(self) -> nn.Module:
        """The dense model in eval mode, ours to change."""
        return throw_away_copy(self.model, None).eval()

    @cached_property
    def dense(self) -> dict[int, Tensor]:
        """The dense weights of the sites with a choice."""
        sites = self.problem.sites.sites
        return {i: weight_of(self.copied, sites[i]).detach().clone() for i in self.problem.free}

    @torch.no_grad()
    def loss(self, choice: dict[int, Pattern] | Sequence[int]) -> float:
        """Loss on the held-back half with these patterns (by site index, absent is dense), after BN recalibration."""
        if not isinstance(choice, dict):
            choice = {i: self.problem.options[i][choice[i]] for i in self.problem.free}
        for i, weight in self.dense.items():
            pattern, site = choice.get(i, Pattern.DENSE), self.problem.sites.sites[i]
            parameter = weight_of(self.copied, site)
            if pattern.is_dense:
                parameter.copy_(weight)
            else:
                grouping = self.problem.grouping(i, pattern)
                mask = make_mask(weight, pattern.n, grouping, self.score, self.evidence.get(site.name))
                torch.mul(weight, mask, out=parameter.data)
        recalibrate_bn(self.copied, self.calibration.for_statistics)
        return loss_on(self.copied, self.calibration.held_back)
