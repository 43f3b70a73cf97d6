"""Sensitivities: the table sites x options -> loss increase, from what a few hundred pictures say. Lower is better.

A sensitivity takes ``(problem, model, evidence)`` and returns one row a site, one number an option, 0 for dense. A new one is
a function in `SENSITIVITIES`. The data-free one, ``weight``, is `Tables.squared_errors`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from nmfx.errors import SearchError
from nmfx.masking.copies import throw_away_copy
from nmfx.models.following import Census
from nmfx.models.products import Operand
from nmfx.models.site import weight_of
from nmfx.models.storages import storage_of
from nmfx.search.evidence import Evidence, Trial
from nmfx.search.problem import Problem
from nmfx.sparsity.mask import make_mask

Table = list[list[float]]


def _dropped(problem: Problem, model: nn.Module) -> Iterator[tuple[int, int, Tensor]]:
    """``(site, option, mask of what the option drops)`` of every option that drops anything."""
    for i in problem.free:
        weight = weight_of(model, problem.sites.sites[i]).detach()
        for option, pattern in enumerate(problem.options[i][:-1]):
            yield i, option, ~make_mask(weight, pattern.n, problem.grouping(i, pattern))


def _empty(problem: Problem) -> Table:
    return [[0.0] * len(options) for options in problem.options]


def by_activations(problem: Problem, model: nn.Module, evidence: Evidence) -> Table:
    """Squared error of each site's own output, as a share of its output's energy: ``sum_dropped w^2 E[x^2]`` over the same sum
    of all weights, `x` being the input each weight meets (uncorrelated inputs assumed; Wanda, Sun et al., 2024, scores so).
    """
    copied, table = throw_away_copy(model, None).eval(), _empty(problem)
    moments = _Moments(list(copied.parameters()))
    with torch.no_grad():
        for x, _ in evidence.batches:
            moments.see(copied, x)
    for i, option, dropped in _dropped(problem, copied):
        site = problem.sites.sites[i]
        weight = weight_of(copied, site).detach()
        energy = weight.float().square().reshape(site.rows) * moments.of(weight_of(copied, site), site.rows)
        table[i][option] = float((energy * dropped.reshape(site.rows)).sum() / energy.sum().clamp_min(1e-30))
    return table


def by_gradients(problem: Problem, model: nn.Module, evidence: Evidence) -> Table:
    """``B / 2 E[(g . dw)^2]``: second-order loss increase with the empirical Fisher matrix for the Hessian, along the very
    change that an option makes (`g` the gradient over a batch of B pictures; Singh & Alistarh, 2020, eq. 4). It costs one
    backward pass a batch and one sum an option.
    """
    copied, table = throw_away_copy(model, None).eval(), _empty(problem)
    parameters = [weight_of(copied, problem.sites.sites[i]) for i in problem.free]
    masks = [(problem.free.index(i), i, option, dropped) for i, option, dropped in _dropped(problem, copied)]
    for parameter in copied.parameters():
        parameter.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    device = parameters[0].device if parameters else torch.device("cpu")
    for x, label in evidence.batches:
        loss = nn.functional.cross_entropy(copied(x.to(device)), label.to(device))
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        products = [None if g is None else (g * p.detach()).float() for g, p in zip(gradients, parameters, strict=True)]
        for place, i, option, dropped in masks:
            if (product := products[place]) is not None:
                change = float(torch.where(dropped, product, 0.0).sum())
                table[i][option] += len(label) / 2 * change**2 / len(evidence.batches)
    return table


def by_measurement(problem: Problem, model: nn.Module, evidence: Evidence) -> Table:
    """Measured loss increase of each single (site, option) on the held-back half, after BN recalibration.

    Never negative, and never less for a sparser option of the same M: what looks better than dense is noise.
    """
    trial, table = Trial(problem, model, evidence), _empty(problem)
    dense = trial.loss({})
    if not math.isfinite(dense):
        raise SearchError(f"the loss of the dense model is {dense} on the data; look at the weights and the pictures")
    for i in problem.free:
        worst: dict[int, float] = {}
        for option, pattern in reversed(list(enumerate(problem.options[i][:-1]))):
            increase = trial.loss({i: pattern}) - dense
            increase = increase if math.isfinite(increase) else 1e9
            table[i][option] = worst[pattern.m] = max(worst.get(pattern.m, 0.0), increase)
    return table


SENSITIVITIES: dict[str, Callable[[Problem, nn.Module, Evidence], Table]] = {
    "activation": by_activations,
    "gradient": by_gradients,
    "measured": by_measurement,
}


class _Moments(Census):
    """Mean square of the input that each entry of the group axis meets, collected over forward passes."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, ())
        self.parameters = parameters
        self.sums: dict[int, Tensor] = {}
        self.call: tuple[str, Any] = ("", ())

    def see(self, model: nn.Module, x: Tensor) -> None:
        """Run one batch; storages of the batch before are gone, so provenance starts anew."""
        x = x.to(self.parameters[0].device)
        Census.__init__(self, self.parameters, (x,))
        with self:
            model(x)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.call = (func._schema.name, args)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _record_weight(self, operand: Operand) -> None:
        if (moment := self._moment(operand)) is not None:
            for parameter in self.storages.held[storage_of(operand.tensor)].parameters:
                before = self.sums.get(id(parameter))
                fits = before is not None and before.shape == moment.shape
                self.sums[id(parameter)] = before + moment if fits and before is not None else moment
        super()._record_weight(operand)

    def _moment(self, operand: Operand) -> Tensor | None:
        """``(outer or 1, length, 1)`` sums of squares, or None where the operands do not say."""
        name, args = self.call
        if name == "aten::convolution":
            x = args[0].detach().float()
            channels = x.square().sum(dim=[0, *range(2, x.dim())])
            per_group = channels.reshape(operand.conv_groups, -1, 1)  # (g, in / g, 1)
            filters = 1 if args[6] else operand.tensor.shape[0] // operand.conv_groups
            return cast(Tensor, per_group.repeat_interleave(filters, dim=0))
        others = [t for t in args if isinstance(t, Tensor) and t is not operand.tensor and t.dim() > 1]
        if not others:
            return None
        other, dim = others[-1].detach().float(), -1 if operand.dim == -2 or name == "aten::linear" else -2
        other = args[0].detach().float() if name == "aten::linear" else other
        squares = other.square().movedim(dim, -1).flatten(0, -2).sum(0)
        return cast(Tensor, squares.reshape(1, -1, 1))

    def of(self, parameter: nn.Parameter, rows: tuple[int, int, int]) -> Tensor:
        """Mean squares broadcastable to `rows`; ones where the operands did not say."""
        found = self.sums.get(id(parameter))
        if found is None or found.shape[1] != rows[1] or found.shape[0] not in (1, rows[0]):
            return parameter.new_ones((1, 1, 1), dtype=torch.float32)
        return found
