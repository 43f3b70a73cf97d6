"""The methods of a search, and the sensitivities that one of them sums up: each an entry that says what it needs.

The entries stand here, where settings can check them without torch; a function that needs torch has a file of its own in
`nmfx.search.methods` or `nmfx.search.sensitivity`, and is named as ``module:function``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

Function = Callable[..., Any] | str


@dataclass(frozen=True)
class Method:
    """One way to choose an option for every site.

    Attributes:
        function: ``(problem, tables, **options) -> choice``: one index into ``problem.options[i]`` a site, within every budget;
            or an `Outcome` that also says how it came to be.
        pictures: whether it looks at any.
        labels: it needs one for each picture.
        sums: it takes a sensitivity, and what it gives is the least sum of it.
        mixed: it chooses among several M and several V for one site.
        timed: the command searches with it under a budget of measured time.
        stepwise: its events are a history; those of the others say what was chosen, in model order.
        looped: with pictures it is the published loop over training batches.
        options: the search settings that are options of its function.
    """

    function: Function
    pictures: Literal["never", "if given", "always"] = "never"
    labels: bool = False
    sums: bool = False
    mixed: bool = False
    timed: bool = False
    stepwise: bool = False
    looped: bool = False
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sensitivity:
    """One table of what the options of each site lose.

    Attributes:
        function: ``tables -> table``: one row a site, one number an option, 0 for dense.
        pictures: whether it looks at any.
        labels: it needs one for each picture.
    """

    function: Function
    pictures: bool = False
    labels: bool = False


METHODS: dict[str, Method] = {
    "domino": Method("nmfx.search.methods.domino:domino", "if given", stepwise=True, looped=True),
    "uniform": Method("nmfx.search.methods.uniform:uniform"),
    "erk": Method("nmfx.search.methods.erk:erk"),
    "knapsack": Method("nmfx.search.methods.knapsack:knapsack", "if given", sums=True, mixed=True, timed=True),
    "spdy": Method("nmfx.search.methods.spdy:spdy", "always", labels=True, mixed=True, timed=True, options=("seconds", "seed")),
}
SENSITIVITIES: dict[str, Sensitivity] = {
    "weight": Sensitivity("nmfx.search.sensitivity.weight:squared_errors"),
    "activation": Sensitivity("nmfx.search.sensitivity.activation:output_errors", pictures=True),
    "corrected": Sensitivity("nmfx.search.sensitivity.corrected:corrected_errors", pictures=True),
    "gradient": Sensitivity("nmfx.search.sensitivity.gradient:directional_gradients", pictures=True, labels=True),
    "measured": Sensitivity("nmfx.search.sensitivity.measured:loss_increases", pictures=True, labels=True),
}


def resolve(function: Function) -> Callable[..., Any]:
    """The function of an entry."""
    if not isinstance(function, str):
        return function
    module, _, name = function.partition(":")
    return getattr(import_module(module), name)  # type: ignore[no-any-return]


def default_sensitivity(method: str, data: bool) -> str:
    """The best sensitivity that the data at hand allow."""
    return "gradient" if data and METHODS[method].sums else "weight"
