"""What a search did: which site stepped when, and why; and the step that uses up what a search has left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


def trim(problem: Problem, choice: Sequence[int]) -> tuple[list[int], list[Event]]:
    """Raise the N of sites, the largest step that still fits first, until no step fits."""
    chosen, events = list(choice), list[Event]()
    while True:
        left = problem.left(chosen)
        steps = [
            (problem.costs[i][chosen[i] + 1] - problem.costs[i][chosen[i]], -i)
            for i in problem.free
            if chosen[i] + 1 < len(problem.options[i])
        ]
        fitting = [step for step in steps if step[0] <= left]
        if not fitting:
            return chosen, events
        index = -max(fitting)[1]
        before, after = problem.options[index][chosen[index] : chosen[index] + 2]
        chosen[index] += 1
        site = problem.sites.sites[index].name
        events.append(Event(site, before, after, f"trim: fits in the {left:,} left", problem.cost(chosen)))
