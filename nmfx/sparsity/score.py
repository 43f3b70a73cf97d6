"""Scores: how much each weight of a group counts when the mask keeps the highest.

A score is a function ``(weight, evidence) -> scores``, 0 or more, shaped as `weight`; the evidence is what was measured once
over calibration batches, and broadcasts to the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from nmfx import text
from nmfx.errors import NmfxError

if TYPE_CHECKING:  # settings know the names without torch
    from torch import Tensor

Needs = Literal["nothing", "inputs", "gradients"]


@dataclass(frozen=True)
class Score:
    """One way to rank weights.

    Attributes:
        function: ``(weight, evidence) -> scores``. A weight comes as ``(outer, length, inner)`` (see `Grouping`).
        needs: what the evidence is: ``nothing`` (None), ``inputs`` (sums of squares of the input that each weight meets,
            ``(outer or 1, length, 1)``), ``gradients`` (mean square of the gradient of a batch's loss, shaped as the weight;
            this one needs labels).
    """

    function: Callable[[Tensor, Tensor], Tensor]
    needs: Needs = "nothing"


SCORES: dict[str, Score] = {
    "magnitude": Score(lambda weight, _: weight.abs()),
    # Wanda (Sun et al., ICLR 2024, eq. 1): |w| times the norm of its input feature
    "input-norm": Score(lambda weight, squares: weight.abs() * squares.sqrt(), "inputs"),
    # diagonal Fisher (Theis et al., 2018, eq. 4; OBD, LeCun et al., 1989): w^2 E[g^2]
    "gradient": Score(lambda weight, squares: weight.square() * squares, "gradients"),
}


def check_score(name: str, error: type[NmfxError] = NmfxError) -> Score:
    """The score called `name`.

    Raises:
        NmfxError: of type `error`; there is none, with the known ones.
    """
    if name not in SCORES:
        raise error(f"unknown score {name!r}{text.nearest(str(name), SCORES)}; known: {', '.join(SCORES)}")
    return SCORES[name]
