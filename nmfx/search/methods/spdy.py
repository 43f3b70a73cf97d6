"""Whole schemes tried out: the table that scores best is bent, solved again, and kept where the network itself says so."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable

from nmfx.errors import SearchError
from nmfx.passes.calibration import explain_failure
from nmfx.search.events import Outcome, moves, spend_rest
from nmfx.search.problem import Problem
from nmfx.search.solver.lagrange import solve_all
from nmfx.search.tables import Table, Tables

SECONDS = 60.0
BENT = 0.1  # share of the sites whose coefficients change in one step
STARTS = ("weight", "activation", "gradient")


def spdy(
    problem: Problem,
    tables: Tables,
    *,
    seconds: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Outcome:
    """Coefficients of the sites, multiplied into the best of the tables, found by local search over whole schemes scored on
    held-back pictures after BN recalibration (SPDY, Frantar & Alistarh, ICML 2022, section 3.3).

    Args:
        problem: the options of each site and the budgets.
        tables: what they lose, and the pictures.
        seconds: time limit (60 unless `steps` is given).
        steps: limit on the schemes tried; with it alone the result is reproducible.
        seed: of the search.
        progress: called with a line of text after each scheme tried.

    Returns:
        The choice of the lowest loss.

    Raises:
        SearchError: a limit that is none.
    """
    for name, number in (("seconds", seconds), ("steps", steps)):
        if number is not None and (not isinstance(number, int | float) or not 0 <= number < math.inf):
            raise SearchError(f"{name} = {number!r}: expected a limit of 0 or more")
    generator, start = random.Random(seed), time.monotonic()  # noqa: S311
    seconds = SECONDS if seconds is None and steps is None else seconds
    trial, limits = tables.trial(), [budget.limit for budget in problem.budgets]
    tried: dict[tuple[int, ...], float] = {}

    def score(table: Table) -> tuple[float, tuple[int, ...]]:
        choice = tuple(spend_rest(problem, solve_all(table, problem.prices, limits).options)[0])
        if choice not in tried:
            with explain_failure(tables.model):
                tried[choice] = trial.loss(choice)
            if progress is not None:
                progress(f"{len(tried)} schemes tried, best loss {min(tried.values()):.4f}")
        return tried[choice], choice

    known = {name: tables.squared_errors if name == "weight" else tables.table(name) for name in STARTS}
    first = {name: score(table) for name, table in known.items()}
    base = min(first, key=lambda name: first[name])
    (best, choice), coefficients = first[base], [1.0] * len(problem.options)
    count = 0
    while (steps is None or count < steps) and (seconds is None or time.monotonic() - start < seconds):
        count += 1
        bent = list(coefficients)
        for i in problem.free:
            if generator.random() < max(BENT, 1 / len(problem.free)):
                bent[i] *= 2 ** generator.gauss(0.0, 1.5)
        found, other = score([[factor * value for value in row] for factor, row in zip(bent, known[base], strict=True)])
        if found < best:
            best, choice, coefficients = found, other, bent
    reason = f"loss {best:.4f} on held-back pictures, {first[base][0]:.4f} at the start ({base}), {len(tried)} schemes tried"
    return Outcome(choice, moves(problem, list(choice), reason))
