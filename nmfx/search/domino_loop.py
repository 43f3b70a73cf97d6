"""DominoSearch as published, inside anybody's training loop (domino.md, sections 3 and 4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from hashlib import sha256
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nmfx.errors import SearchError
from nmfx.masking.owner import mask_attribute, unmask
from nmfx.masking.sites import masked_sites, respec
from nmfx.masking.weight import STATES, MaskSpec, mask_name
from nmfx.models.census import find_sites
from nmfx.models.site import Sites, weight_of
from nmfx.passes.thresholds import SUFFIXES, attach_thresholds, detach_thresholds, thresholds_of
from nmfx.processes import world
from nmfx.scheme import Scheme
from nmfx.search.baselines import erk_sparsities
from nmfx.search.domino import penalties
from nmfx.search.events import Event, Outcome, trim
from nmfx.search.problem import Problem, make_scheme, pose
from nmfx.settings.search import Loop
from nmfx.settings.target import BudgetKind
from nmfx.sparsity.layout import Grouping
from nmfx.sparsity.pattern import Pattern


class DominoSearch:
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
        loop = {name: options.pop(name) for name in Loop.__dataclass_fields__ if name in options}
        self.loop, self.model = Loop(**loop), model
        self.sites = sites if sites is not None else find_sites(model, example_input)
        self.problem: Problem = pose(self.sites, target=target, budget=budget, limits=limits, **options)
        self.t, self.events, self.shares = 0, list[Event](), dict[str, float]()
        self._choice = [len(options) - 1 for options in self.problem.options]
        self._erk = erk_sparsities(self.problem)
        self._groupings = {i: self.problem.grouping(i) for i in self.problem.free}
        self._working = {i: self.problem.first(i) for i in self.problem.free}
        self._convert()
        self._eta = self._penalties()
        self.done = self._holds()

    def _convert(self) -> None:
        for module in self.model.modules():
            unmask(module, keep_masked=False)
        for i in self.problem.free:
            weight = weight_of(self.model, self.sites.sites[i])
            if weight.device.type == "meta" or not bool(weight.isfinite().all()):
                raise SearchError(f"{self._name(i)}: holds no values, or infinite or NaN ones; load weights before the search")
        groupings = {self._name(i): grouping for i, grouping in self._groupings.items()}
        attach_thresholds(self.model, self.sites, groupings, self.intermediate)
        for i, site in enumerate(self.sites):
            start, twin = self.problem.options[i][-1], None
            pattern = Pattern(self._working[i], self._groupings[i].m) if i in self._groupings else start
            if i not in self._groupings and start.is_dense:
                continue
            for path, attr in site.owners:
                owner = self.model.get_submodule(path)
                spec = MaskSpec(site.name, pattern, self.problem.grouping(i), decay=None, derived=site.derived)
                mask_attribute(owner, attr, spec, twin)
                twin = twin or (owner, attr)

    def _name(self, index: int) -> str:
        return self.sites.sites[index].name

    @property
    def intermediate(self) -> dict[str, int]:
        """The working N of each site with a choice."""
        return {self._name(i): n for i, n in self._working.items()}

    @property
    def committed(self) -> dict[str, int]:
        """The committed N of each site with a choice; M while it is dense, what it came with while that is a sparse start."""

        def at(i: int) -> int:
            stepped = self._choice[i] < len(self.problem.options[i]) - 1
            return self.problem.options[i][self._choice[i]].n if stepped else self.problem.first(i)

        return {self._name(i): at(i) for i in self.problem.free}

    @property
    def eta(self) -> dict[str, float]:
        """The penalty factor of each site with a choice."""
        return {self._name(i): value for i, value in self._eta.items()}

    @property
    def sparsity(self) -> float:
        """Share dropped of what the leading budget counts, over all sites."""
        return 1 - self.problem.cost(self._choice) / self.problem.budget.dense

    @property
    def stalled(self) -> bool:
        """Whether no site that can still step is under a penalty, so that only training itself can go on."""
        return not self.done and all(self._eta[i] <= 0 for i in self._voters())

    def _penalties(self) -> dict[int, float]:
        if not self.loop.eta:
            return dict.fromkeys(self.problem.free, 1.0)
        return penalties(self.problem, self._choice, self._erk, self.loop.b1, self.loop.b2)

    def _holds(self) -> bool:
        budgets = enumerate(self.problem.budgets)
        tolerance = self.loop.tolerance
        return all(1 - self.problem.cost(self._choice, b) / one.dense >= one.target - tolerance for b, one in budgets)

    def _voters(self) -> list[int]:
        """Sites that can still step."""
        return [i for i in self.problem.free if self._choice[i] > 0]

    def step(self) -> tuple[Event, ...]:
        """One iteration: the penalty is due at the optimiser's next step, and every so often the sites vote.

        Returns:
            The commits of this iteration.

        Raises:
            SearchError: the search is done.
        """
        if self.done:
            raise SearchError("the search is done: take search.scheme")
        self._penalise()
        events = self._vote() if self.t % self.loop.vote_every == 0 else ()
        self.t += 1
        return events

    def _penalise(self) -> None:
        """``decay * eta_l * w`` for the gradients of kept weights, when the optimiser steps."""
        due, decay = self.t % self.loop.penalty_every == 0, self.loop.decay_at(self.t)
        for i, eta in self._eta.items():
            path, attr = self.sites.sites[i].owners[0]
            owner = self.model.get_submodule(path)
            mask = owner._buffers[mask_name(attr)]  # of the forward pass, before the vote
            assert mask is not None
            owner.__dict__[STATES][attr].penalty = (decay * eta, mask) if due and eta else None

    def _vote(self) -> tuple[Event, ...]:
        """Every site that can still step takes a vote, in model order; the search may end in the middle of a round."""
        before = len(self.events)
        voters = self._voters()
        shares = self._shares(voters)
        for i, share in zip(voters, shares, strict=True):
            self.shares[self._name(i)] = share
        for i, share in zip(voters, shares, strict=True):
            if share >= self.loop.quorum:
                self._tip(i, share)
                if self.done:
                    break
        return tuple(self.events[before:])

    @torch.no_grad()
    def _shares(self, voters: list[int]) -> list[float]:
        """Share of each voter's groups in which fewer than n weights exceed the threshold; the first process's counts."""
        shares = torch.zeros(len(voters), dtype=torch.float64)
        for place, i in enumerate(voters):
            weight = weight_of(self.model, self.sites.sites[i])
            threshold, count = thresholds_of(self.model, self.sites.sites[i])
            count.copy_(_above(weight, threshold, self._groupings[i]))
            shares[place] = (count < self._working[i]).double().mean()
        if world() > 1:
            device = next(self.model.parameters()).device
            shares = shares.to(device)
            dist.broadcast(shares, src=0)
        values: list[float] = shares.tolist()
        return values

    def _tip(self, i: int, share: float) -> None:
        """One N less for a site; a commit where that is a candidate."""
        self._working[i] -= 1
        self._mask(i)
        options, name = self.problem.options[i], self._name(i)
        after = options[self._choice[i] - 1]
        if self._working[i] == after.n:
            before = options[self._choice[i]]
            self._choice[i] -= 1
            reason = f"{share:.0%} of groups below T, eta = {self._eta[i]:.3g}"
            self.events.append(Event(name, before, after, reason, self.problem.cost(self._choice), float(self.t)))
            self._eta = self._penalties()
            self.done = self._holds()

    def _mask(self, i: int) -> None:
        """Let the masks of a site keep its working N."""
        grouping, name = self._groupings[i], self._name(i)
        pattern = Pattern(self._working[i], grouping.m)
        respec([s for s in masked_sites(self.model) if s.spec.name == name and s.spec.pattern != pattern], pattern=pattern)

    @property
    def outcome(self) -> Outcome:
        """The committed options, brought within every budget and then up to it, with the events of both.

        A search that stopped within its tolerance takes the steps it was nearest to; what is left is spent on steps that fit.

        Raises:
            SearchError: the search is not done.
        """
        if not self.done:
            target = float(self.problem.budget.target)
            raise SearchError(f"the search is not done: sparsity {self.sparsity:.4f} of {target:g} after {self.t} iterations")
        choice, working, events = list(self._choice), dict(self._working), list(self.events)
        while not self.problem.fits(choice):
            ahead = {i: working[i] - self.problem.options[i][choice[i] - 1].n for i in self.problem.free if choice[i]}
            i = min(ahead, key=lambda i: (ahead[i] / self._groupings[i].m, -self._eta[i], i))
            before, after = self.problem.options[i][choice[i]], self.problem.options[i][choice[i] - 1]
            choice[i], working[i] = choice[i] - 1, min(working[i], after.n)
            cost, reason = self.problem.cost(choice), "settle: the budget holds only within the tolerance"
            events.append(Event(self._name(i), before, after, reason, cost, float(self.t)))
        chosen, trims = trim(self.problem, choice)
        return Outcome(tuple(chosen), (*events, *(replace(event, time=float(self.t)) for event in trims)))

    @property
    def scheme(self) -> Scheme:
        """What was found; never above the budget.

        Raises:
            SearchError: the search is not done.
        """
        choice = self.outcome.choice
        patterns = {self._name(i): o[c] for i, (o, c) in enumerate(zip(self.problem.options, choice, strict=True))}
        return make_scheme(self.model, self.problem, patterns, self.method)

    @property
    def method(self) -> str:
        """What a scheme says it was found by."""
        return "domino with data" if self.loop.eta else "domino with data, without eta"

    def detach(self) -> None:
        """Take masks and score buffers off again; the dense weights stay as the search left them."""
        for module in self.model.modules():
            unmask(module, keep_masked=False)
        detach_thresholds(self.model, self.sites, [self._name(i) for i in self.problem.free])

    @property
    def identity(self) -> str:
        """What has to agree for one search to go on where another stopped."""
        targets = ", ".join(f"{float(b.target):g} of {b.kind}" for b in self.problem.budgets)
        patterns = sha256(repr(self.problem.options).encode()).hexdigest()[:8]
        return f"target {targets}; {self.loop}; sites {self.sites.fingerprint}; patterns {patterns}"

    def _check_attached(self) -> None:
        free = self.problem.free
        if free and not hasattr(self.model.get_submodule(self.sites.sites[free[0]].owners[0][0]), self._buffer(free[0])):
            raise SearchError("the search was detached from its model: its thresholds are gone")

    def _buffer(self, index: int) -> str:
        return self.sites.sites[index].owners[0][1] + SUFFIXES[0]

    def state_dict(self) -> dict[str, Any]:
        """Everything but the model's, the optimiser's and the loader's state: plain values and tensors."""
        self._check_attached()
        return {
            "search": self.identity,
            "t": self.t,
            "done": self.done,
            "working": self.intermediate,
            "choice": {self._name(i): self._choice[i] for i in self.problem.free},
            "thresholds": {self._name(i): thresholds_of(self.model, self.sites.sites[i])[0].clone() for i in self.problem.free},
            "shares": dict(self.shares),
            "events": [{**asdict(e), "before": str(e.before), "after": str(e.after)} for e in self.events],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was called, with the model's and the optimiser's state of that moment loaded as well.

        Raises:
            SearchError: the state is of another search.
        """
        self._check_attached()
        names = [self._name(i) for i in self.problem.free]
        if state.get("search") != self.identity:
            raise SearchError(
                f"the state is of another search: {state.get('search', 'not of DominoSearch')}; this one is {self.identity}"
            )
        for i, name in zip(self.problem.free, names, strict=True):
            threshold, saved = thresholds_of(self.model, self.sites.sites[i])[0], state["thresholds"][name]
            if threshold.shape != saved.shape or not 0 <= state["choice"][name] < len(self.problem.options[i]):
                raise SearchError(f"{name}: the state is of another search; give the same model and options")
            threshold.copy_(saved)
            self._working[i], self._choice[i] = state["working"][name], state["choice"][name]
            self._mask(i)
        self.t, self.done, self.shares = state["t"], state["done"], dict(state["shares"])
        self.events = [Event(**{**e, "before": Pattern(e["before"]), "after": Pattern(e["after"])}) for e in state["events"]]
        self._eta = self._penalties()


def _above(weight: Tensor, threshold: Tensor, grouping: Grouping) -> Tensor:
    """How many weights of each group exceed its threshold: ``(groups,)``, uint8."""
    lines, counts, start = grouping.as_lines(weight.detach().abs().contiguous()), [], 0
    for block in grouping.blocks(lines):  # (outer, groups, size, inner)
        outer, groups, _, inner = block.shape
        part = threshold[start : start + outer * groups * inner].view(outer, groups, 1, inner)
        counts.append((block > part).sum(dim=2, dtype=torch.uint8).flatten())
        start += part.numel()
    return torch.cat(counts)
