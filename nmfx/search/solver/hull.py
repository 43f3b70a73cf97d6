"""The least summed loss against the budget: the lower convex hull of all choices, which needs no solver."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def hull(losses: Sequence[Sequence[float]], costs: Sequence[Sequence[int]]) -> list[tuple[int, float]]:
    """Corners (summed cost, summed loss) from the cheapest choice to that of least loss, both falling in steepness.

    Every corner is a choice, and the best one at its cost; between two corners the line is a lower bound (the relaxation of the
    multiple-choice knapsack: Kellerer, Pferschy, Pisinger, 2004, section 11.2).
    """
    cost, loss, steps = 0, 0.0, list[tuple[float, int, float]]()
    for row, prices in zip(losses, costs, strict=True):
        corners = _lower(sorted(zip(prices, row, strict=True)))
        cost, loss = cost + corners[0][0], loss + corners[0][1]
        for before, after in pairwise(corners):
            dearer, less = after[0] - before[0], after[1] - before[1]
            steps.append((less / dearer, dearer, less))
    points = [(cost, loss)]
    for _, dearer, less in sorted(steps):
        cost, loss = cost + dearer, loss + less
        points.append((cost, max(0.0, loss)))
    return points


def _lower(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The falling part of the lower convex hull of points that ascend in cost."""
    corners: list[tuple[int, float]] = []
    for point in points:
        if corners and point[1] >= corners[-1][1]:
            continue  # dearer and no better
        while len(corners) > 1 and _slope(corners[-2], point) <= _slope(corners[-2], corners[-1]):
            corners.pop()
        corners.append(point)
    return corners


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
