"""DominoSearch as published, inside anybody's training loop (domino.md, sections 3 and 4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from nmfx.errors import SearchError
from nmfx.masking.owner import mask_attribute, unmask_model
from nmfx.masking.sites import masked_sites, respec
from nmfx.masking.weight import MaskSpec
from nmfx.models.census import find_sites
from nmfx.models.site import Sites, weight_of
from nmfx.passes.thresholds import SUFFIXES, attach_thresholds, detach_thresholds, exceeding, thresholds_of
from nmfx.processes import world
from nmfx.scheme import Scheme
from nmfx.search.domino_numbers import DominoNumbers
from nmfx.search.events import Event
from nmfx.search.problem import make_problem, make_scheme
from nmfx.settings.search import DominoSettings
from nmfx.settings.target import BudgetKind
from nmfx.sparsity.pattern import Pattern


class DominoSearch(DominoNumbers):
    """Layer-wise N:M search by a penalty that makes layers tip one after the other (Sun et al., NeurIPS 2021).

    ``search.step()`` goes between ``loss.backward()`` and ``optimizer.step()``, once an update; the penalty that it sets is
    applied by the optimiser's step, unscaled and unclipped, as SR-STE's pull is (see `transform`)::

        search = DominoSearch(model, 0.875, example_input=x)
        while not search.done:
            optimizer.zero_grad()
            loss_of(model, next(batches)).backward()
            search.step()
            optimizer.step()
        scheme = search.scheme

    The model is converted in place: each site with a choice is read through the mask of its intermediate N, which follows the
    weights, and gradients reach kept weights only. Parameters and their names stay, so any optimiser will do; the published
    one is SGD with lr 0.01, no momentum, no weight decay, batch 64. The weights change: search a copy if you need them. When it
    is done, the masks are those of the intermediate N's: ``detach()`` and ``transform`` with the scheme before training on.
    Under DDP (wrap the model after making the search) all processes follow the votes of the first.

    Args:
        target, budget, limits: as in `find_scheme`.
        example_input, sites: as in `transform`.
        eta: layer-wise penalty factors; False is the ablation with 1 everywhere.
        b1, b2: shares of MACs and ERK in eta; by the budget: 0.5 and 0.5, for MACs 0.8 and 0.2.
        decay: penalty on kept weights, doubled at each iteration of `doublings`.
        penalty_every, vote_every: iterations between penalties, and between votes.
        quorum: share of a site's groups that must have fewer than n weights above their threshold.
        tolerance: the search is done when the sparsity is within this of the target. `scheme` is never above the budget.
        choices: what a site may be given (see `Choices`).

    Attributes:
        t: iterations done.
        done: whether the budget holds.
        intermediate, committed: by site name, the working N and the committed one (M while dense).
        eta: by site name, the penalty factors now.
        shares: by site name, the share of groups that agreed at the last vote.
        events: every commit; ``time`` is the iteration.

    Raises:
        SearchError: a target out of reach, numbers out of range, weights without values.
        TraceError: the forward pass fails on the example input.
    """

    def __init__(
        self,
        model: nn.Module,
        target: float | str = 0.875,
        *,
        budget: BudgetKind = "params",
        limits: Mapping[str, float | str] | None = None,
        example_input: Any = None,
        sites: Sites | None = None,
        **options: Any,
    ) -> None:
        if "latency" in (budget, *(limits or {})):
            raise SearchError(
                "DominoSearch counts params, macs or bytes; under a budget of latency use find_scheme with method 'knapsack', "
                "'spdy' or 'domino' (data-free)"
            )
        loop = {name: options.pop(name) for name in DominoSettings.__dataclass_fields__ if name in options}
        self.model, self.sites = model, sites if sites is not None else find_sites(model, example_input)
        settings = DominoSettings(**loop)
        super().__init__(make_problem(self.sites, target=target, budget=budget, limits=limits, **options), settings)
        if odd := next((o for o in self.problem.options if not o[-1].is_dense and o[-1].vector % o[0].vector), None):
            raise SearchError(
                f"a sparse start whose masks are shared by {odd[-1].vector} rows ({odd[-1]}) would lose weights at once under "
                f"masks of {odd[0].vector}; give vector={odd[-1].vector}, or method 'knapsack'"
            )
        self._convert()
        names = {self._name(i): i for i in self.problem.free}
        self._masked = {names[one.spec.name]: one for one in masked_sites(model) if one.spec.name in names}

    def _convert(self) -> None:
        unmask_model(self.model, keep_masked=False)
        for i in self.problem.free:
            weight = weight_of(self.model, self.sites.sites[i])
            if weight.device.type == "meta" or not bool(weight.isfinite().all()):
                raise SearchError(f"{self._name(i)}: holds no values, or infinite or NaN ones; load weights before the search")
        attach_thresholds(self.model, self.sites, self.problem.groupings, self.intermediate)
        for i, site in enumerate(self.sites):
            pattern, grouping, twin = self.problem.options[i][-1], self.problem.grouping(i), None
            if i in self._working:
                pattern = Pattern(self._working[i], grouping.m, grouping.vector)
            elif pattern.is_dense:
                continue
            spec = MaskSpec(site.name, pattern, grouping, decay=None, derived=site.derived)
            for path, attr in site.owners:
                owner = self.model.get_submodule(path)
                mask_attribute(owner, attr, spec, twin)
                twin = twin or (owner, attr)

    def step(self) -> tuple[Event, ...]:
        """One iteration: the penalty is due at the optimiser's next step, and every so often the sites vote.

        Returns:
            The commits of this iteration.

        Raises:
            SearchError: the search is done.
        """
        if self.done:
            raise SearchError("the search is done: take search.scheme")
        for i, amount in self.due_penalties().items():  # for what the forward pass kept, before the vote
            self._masked[i].penalise(amount)
        events: tuple[Event, ...] = ()
        if self.votes_now:
            voters = self.voters()
            events, tipped = self.take_votes(voters, self.count_votes(voters))
            for i in tipped:
                self._set_masks(i)
        self.t += 1
        return events

    @torch.no_grad()
    def count_votes(self, voters: list[int]) -> list[float]:
        """Share of each voter's groups in which fewer than n weights exceed the threshold; the first process's counts."""
        shares = torch.zeros(len(voters), dtype=torch.float64)
        for place, i in enumerate(voters):
            weight = weight_of(self.model, self.sites.sites[i])
            threshold, count = thresholds_of(self.model, self.sites.sites[i])
            count.copy_(exceeding(weight, threshold, self.problem.grouping(i)))
            shares[place] = (count < self._working[i]).double().mean()
        if world() > 1:
            device = next(self.model.parameters()).device
            shares = shares.to(device)
            dist.broadcast(shares, src=0)
        values: list[float] = shares.tolist()
        return values

    def _set_masks(self, i: int) -> None:
        """Let the masks of a site keep its working N."""
        pattern = replace(self._masked[i].spec.pattern, n=self._working[i])
        if self._masked[i].spec.pattern != pattern:
            respec([self._masked[i]], pattern=pattern)

    @property
    def scheme(self) -> Scheme:
        """What was found; never above the budget.

        Raises:
            SearchError: the search is not done.
        """
        choice = self.outcome.choice
        patterns = {self._name(i): o[c] for i, (o, c) in enumerate(zip(self.problem.options, choice, strict=True))}
        return make_scheme(self.model, self.problem, patterns, self.method)

    def detach(self) -> None:
        """Take masks and score buffers off again; the dense weights stay as the search left them."""
        unmask_model(self.model, keep_masked=False)
        detach_thresholds(self.model, self.sites, [self._name(i) for i in self.problem.free])

    def _check_attached(self) -> None:
        path, attr = self.sites.sites[self.problem.free[0]].owners[0] if self.problem.free else ("", "")
        if attr and not hasattr(self.model.get_submodule(path), attr + SUFFIXES[0]):
            raise SearchError("the search was detached from its model: its thresholds are gone")

    def state_dict(self) -> dict[str, Any]:
        """Everything but the model's, the optimiser's and the loader's state: plain values and tensors."""
        self._check_attached()
        sites = [self.sites.sites[i] for i in self.problem.free]
        return super().state_dict() | {"thresholds": {s.name: thresholds_of(self.model, s)[0].clone() for s in sites}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was called, with the model's and the optimiser's state of that moment loaded as well.

        Raises:
            SearchError: the state is of another search.
        """
        self._check_attached()
        if state.get("search") != self.identity:
            raise SearchError(
                f"the state is of another search: {state.get('search', 'not of DominoSearch')}; this one is {self.identity}"
            )
        for i in self.problem.free:
            name, threshold = self._name(i), thresholds_of(self.model, self.sites.sites[i])[0]
            saved = state["thresholds"][name]
            if threshold.shape != saved.shape or not 0 <= state["choice"][name] < len(self.problem.options[i]):
                raise SearchError(f"{name}: the state is of another search; give the same model and options")
            threshold.copy_(saved)
        super().load_state_dict(state)
        for i in self.problem.free:
            self._set_masks(i)
