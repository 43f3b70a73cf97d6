"""The arithmetic of the published loop (domino.md, sections 3 and 4): votes, commits, penalties; no model and no tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from hashlib import sha256
from typing import Any

from nmfx.errors import SearchError
from nmfx.search.events import Event, Outcome, spend_rest
from nmfx.search.methods.domino import penalties
from nmfx.search.methods.erk import erk_sparsities
from nmfx.search.problem import Problem
from nmfx.settings.search import DominoSettings
from nmfx.sparsity.pattern import Pattern


class DominoNumbers:
    """Where a search stands: working N's and committed options of the sites, penalty factors, and what became of the votes.

    Attributes: those of `DominoSearch`, but for the model's.
    """

    def __init__(self, problem: Problem, loop: DominoSettings) -> None:
        self.problem, self.loop = problem, loop
        self.t, self.events, self.shares = 0, list[Event](), dict[str, float]()
        self._choice = [len(options) - 1 for options in problem.options]
        self._erk = erk_sparsities(problem)
        self._working = {i: problem.start_n(i) for i in problem.free}
        self._eta = self._penalties()
        self.done = self._holds()

    def _name(self, index: int) -> str:
        return self.problem.sites.sites[index].name

    @property
    def intermediate(self) -> dict[str, int]:
        """The working N of each site with a choice."""
        return {self._name(i): n for i, n in self._working.items()}

    @property
    def committed(self) -> dict[str, int]:
        """The committed N of each site with a choice; M while it is dense, what it came with while that is a sparse start."""

        def at(i: int) -> int:
            stepped = self._choice[i] < len(self.problem.options[i]) - 1
            return self.problem.options[i][self._choice[i]].n if stepped else self.problem.start_n(i)

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
        return not self.done and all(self._eta[i] <= 0 for i in self.voters())

    def _penalties(self) -> dict[int, float]:
        if not self.loop.eta:
            return dict.fromkeys(self.problem.free, 1.0)
        return penalties(self.problem, self._choice, self._erk, self.loop.b1, self.loop.b2)

    def _holds(self) -> bool:
        budgets = enumerate(self.problem.budgets)
        tolerance = self.loop.tolerance
        return all(1 - self.problem.cost(self._choice, b) / one.dense >= one.target - tolerance for b, one in budgets)

    def voters(self) -> list[int]:
        """Sites that can still step."""
        return [i for i in self.problem.free if self._choice[i] > 0]

    def due_penalties(self) -> dict[int, float]:
        """By site, ``decay * eta_l`` of this iteration: what times the weight is added to its gradient; 0 between penalties."""
        due, decay = self.t % self.loop.penalty_every == 0, self.loop.decay_at(self.t)
        return {i: decay * eta if due else 0.0 for i, eta in self._eta.items()}

    @property
    def votes_now(self) -> bool:
        """Whether the sites vote in this iteration."""
        return self.t % self.loop.vote_every == 0

    def take_votes(self, voters: Sequence[int], shares: Sequence[float]) -> tuple[tuple[Event, ...], list[int]]:
        """Every site that can still step takes a vote, in model order; the search may end in the middle of a round.

        Args:
            voters: those sites.
            shares: the share of each one's groups in which fewer than n weights exceed the threshold.

        Returns:
            The commits, and the sites whose working N is one less.
        """
        before, tipped = len(self.events), list[int]()
        self.shares |= {self._name(i): share for i, share in zip(voters, shares, strict=True)}
        for i, share in zip(voters, shares, strict=True):
            if share >= self.loop.quorum:
                self._tip(i, share)
                tipped.append(i)
                if self.done:
                    break
        return tuple(self.events[before:]), tipped

    def _tip(self, i: int, share: float) -> None:
        """One N less for a site; a commit where that is a candidate."""
        self._working[i] -= 1
        options, name = self.problem.options[i], self._name(i)
        after = options[self._choice[i] - 1]
        if self._working[i] == after.n:
            before = options[self._choice[i]]
            self._choice[i] -= 1
            reason = f"{share:.0%} of groups below T, eta = {self._eta[i]:.3g}"
            self.events.append(Event(name, before, after, reason, self.problem.cost(self._choice), float(self.t)))
            self._eta = self._penalties()
            self.done = self._holds()

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
            i = min(ahead, key=lambda i: (ahead[i] / self.problem.options[i][0].m, -self._eta[i], i))
            before, after = self.problem.options[i][choice[i]], self.problem.options[i][choice[i] - 1]
            choice[i], working[i] = choice[i] - 1, min(working[i], after.n)
            cost, reason = self.problem.cost(choice), "settle: the budget holds only within the tolerance"
            events.append(Event(self._name(i), before, after, reason, cost, float(self.t)))
        chosen, raised = spend_rest(self.problem, choice)
        return Outcome(tuple(chosen), (*events, *(replace(event, time=float(self.t)) for event in raised)))

    @property
    def method(self) -> str:
        """What a scheme says it was found by."""
        return "domino with data" if self.loop.eta else "domino with data, without eta"

    @property
    def identity(self) -> str:
        """What has to agree for one search to go on where another stopped."""
        targets = ", ".join(f"{float(b.target):g} of {b.kind}" for b in self.problem.budgets)
        patterns = sha256(repr(self.problem.options).encode()).hexdigest()[:8]
        return f"target {targets}; {self.loop}; sites {self.problem.sites.fingerprint}; patterns {patterns}"

    def state_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            "search": self.identity,
            "t": self.t,
            "done": self.done,
            "working": self.intermediate,
            "choice": {self._name(i): self._choice[i] for i in self.problem.free},
            "shares": dict(self.shares),
            "events": [{**asdict(e), "before": str(e.before), "after": str(e.after)} for e in self.events],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was called.

        Raises:
            SearchError: the state is of another search.
        """
        for i in self.problem.free:
            self._working[i], self._choice[i] = state["working"][self._name(i)], state["choice"][self._name(i)]
        self.t, self.done, self.shares = state["t"], state["done"], dict(state["shares"])
        self.events = [Event(**{**e, "before": Pattern(e["before"]), "after": Pattern(e["after"])}) for e in state["events"]]
        self._eta = self._penalties()
