"""Laws of the published loop's arithmetic, without a model."""

from __future__ import annotations

import json
import random

import pytest
from small import searched

from nmfx.search.domino_numbers import DominoNumbers
from nmfx.search.problem import make_problem
from nmfx.settings.search import DominoSettings


def numbers(target: float = 0.75, **options: object) -> DominoNumbers:
    return DominoNumbers(make_problem(searched("digits")[1], target=target), DominoSettings(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(5))
def test_any_votes_end_within_the_budget(seed: int) -> None:
    draw, search = random.Random(seed), numbers()
    while not search.done:
        voters = search.voters()
        before = dict(search.intermediate)
        shares = [draw.choice([0.5, 0.75, 1.0]) for _ in voters]
        events, tipped = search.take_votes(voters, shares)
        assert {i for i, share in zip(voters, shares, strict=True) if share >= 0.75} >= set(tipped)
        assert sum(before.values()) - sum(search.intermediate.values()) == len(tipped)
        assert len(events) <= len(tipped)
        search.t += 1
    outcome = search.outcome
    assert search.problem.fits(outcome.choice)
    assert all(event.time <= search.t for event in outcome.events)


def test_penalties_are_due_every_so_often_and_double() -> None:
    search = numbers(penalty_every=2, decay=0.5, doublings=(2,))
    assert search.due_penalties() == {i: 0.5 * eta for i, eta in zip(search.problem.free, search.eta.values(), strict=True)}
    search.t = 1
    assert set(search.due_penalties().values()) == {0.0}
    search.t = 2
    assert search.due_penalties() == dict(zip(search.problem.free, search.eta.values(), strict=True))


def test_a_state_is_plain_and_goes_on_alike() -> None:
    search, other = numbers(), numbers()
    search.take_votes(search.voters(), [1.0] * len(search.voters()))
    other.load_state_dict(json.loads(json.dumps(search.state_dict())))
    assert other.state_dict() == search.state_dict()
    assert other.eta == search.eta
