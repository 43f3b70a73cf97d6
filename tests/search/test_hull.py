"""Laws of the curve of an exact method: a bound below every choice, and reached at every corner."""

from __future__ import annotations

import itertools
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from nmfx.search.solver.hull import hull

ROW = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 1000)), min_size=1, max_size=4)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(rows=st.lists(ROW, min_size=1, max_size=4))
def test_no_choice_is_below_and_every_corner_is_one(rows: list[list[tuple[int, int]]]) -> None:
    losses, costs = [[loss for _, loss in row] for row in rows], [[cost for cost, _ in row] for row in rows]
    corners = hull(losses, costs)
    choices = [(sum(c for c, _ in choice), sum(v for _, v in choice)) for choice in itertools.product(*rows)]
    for corner in corners:
        assert any(cost == corner[0] and abs(loss - corner[1]) < 1e-9 for cost, loss in choices)
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(corners)]
    assert all(slope < 0 for slope in slopes)
    assert all(a <= b + 1e-9 for a, b in pairwise(slopes))
    assert corners[0][0] == min(cost for cost, _ in choices)
    for cost, loss in choices:
        below = [b[1] + (cost - b[0]) * (b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(corners) if a[0] <= cost <= b[0]]
        assert loss >= (below[0] if below else corners[-1][1]) - 1e-9
