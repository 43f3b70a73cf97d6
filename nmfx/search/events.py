"""What a search did: which site stepped when, and why; and steps that bring a choice within its budgets and up to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nmfx.errors import SearchError
from nmfx.search.problem import Problem
from nmfx.sparsity.pattern import Pattern


@dataclass(frozen=True)
class Event:
    """One step: `site` went from one pattern to another. `time` is the method's own clock, `cost` the sum afterwards."""

    site: str
    before: Pattern
    after: Pattern
    reason: str
    cost: int
    time: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What a method returns: one option a site, and its events."""

    choice: tuple[int, ...]
    events: tuple[Event, ...]


def settle(problem: Problem, choice: Sequence[int]) -> tuple[list[int], list[Event]]:
    """Bring a choice within every budget, by the option that saves most of what is exceeded most, until all hold.

    Nothing to do where costs fall with N; measured times need not.

    Raises:
        SearchError: two budgets that pull in different directions.
    """
    chosen, events = list(choice), list[Event]()
    while not problem.fits(chosen):
        over = [-problem.left(chosen, b) / max(1, budget.limit) for b, budget in enumerate(problem.budgets)]
        worst = over.index(max(over))
        prices, kind = problem.prices[worst], problem.budgets[worst].kind
        saving, _, i = max((prices[i][chosen[i]] - min(prices[i]), -i, i) for i in problem.free)
        if saving <= 0 or len(events) > len(problem.free) * len(problem.budgets):
            names = " and ".join(budget.kind for budget in problem.budgets)
            raise SearchError(f"no choice within the limits of {names} was found this way; try method 'knapsack'")
        option = prices[i].index(min(prices[i]))
        before, after = problem.options[i][chosen[i]], problem.options[i][option]
        chosen[i] = option
        site = problem.sites.sites[i].name
        events.append(Event(site, before, after, f"settle: the cheapest in {kind}", problem.cost(chosen)))
    return chosen, events


def spend_rest(problem: Problem, choice: Sequence[int]) -> tuple[list[int], list[Event]]:
    """Use up what a choice leaves: raise the N of sites, the largest step that still fits first, until no step fits.

    Where options differ in V, a step goes to the smallest V that fits, and to none that is larger (see `Problem.steps_up`).
    """
    chosen, events = list(choice), list[Event]()
    budgets = range(len(problem.budgets))
    while True:
        left = [problem.left(chosen, b) for b in budgets]
        steps = []
        for i in problem.free:
            for up in problem.steps_up(i, chosen[i]):
                step = [problem.prices[b][i][up] - problem.prices[b][i][chosen[i]] for b in budgets]
                if all(cost <= room for cost, room in zip(step, left, strict=True)):
                    steps.append((step[0], -i, up))
                    break
        if not steps:
            return chosen, events
        _, negative, up = max(steps)
        index = -negative
        before, after = problem.options[index][chosen[index]], problem.options[index][up]
        chosen[index] = up
        site = problem.sites.sites[index].name
        events.append(Event(site, before, after, f"trim: fits in the {left[0]:,} left", problem.cost(chosen)))


def moves(problem: Problem, choice: list[int], reason: str) -> tuple[Event, ...]:
    """Events of a method that decides in one go, in model order."""
    current = [len(options) - 1 for options in problem.options]
    events = []
    for i in problem.free:
        if choice[i] != current[i]:
            before, current[i] = problem.options[i][current[i]], choice[i]
            site, after = problem.sites.sites[i].name, problem.options[i][choice[i]]
            events.append(Event(site, before, after, reason, problem.cost(current)))
    return tuple(events)
