"""What is to be saved, as it is written: a sparsity, a share to keep, or times fewer."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Literal

from nmfx.errors import SearchError

BudgetKind = Literal["params", "macs", "bytes", "latency"]


def parse_target(target: float | str) -> float | Fraction:
    """A sparsity: ``0.875`` as it is, ``"8x"`` (eight times fewer) as 7/8.

    Raises:
        SearchError: it is neither, or not in 0 <= target < 1.
    """
    value: float | Fraction = -1.0
    if isinstance(target, str):
        if found := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*[xX]\s*", target):
            value = 1 - 1 / Fraction(found[1]) if Fraction(found[1]) >= 1 else -1.0
        elif re.fullmatch(r"\s*\d*\.?\d+\s*", target):
            value = float(target)
    elif isinstance(target, int | float | Fraction) and not isinstance(target, bool):
        value = target if isinstance(target, Fraction) else float(target)
    if not 0 <= value < 1:
        raise SearchError(
            f"target {_shown(target)}: expected a sparsity in 0 <= target < 1, such as 0.875, or times fewer, such as 8x"
        )
    return value


def parse_limit(share: float | str) -> float | Fraction:
    """The target of a limit: ``0.125`` is the share that may be kept, ``"8x"`` is eight times fewer.

    Raises:
        SearchError: it is neither, or keeps nothing or more than everything.
    """
    written = str(share).strip()
    try:
        kept = 1 - Fraction(parse_target(written)) if written.lower().endswith("x") else Fraction(written)
    except ValueError:
        kept = Fraction(0)
    if not 0 < kept <= 1:
        raise SearchError(
            f"limit {_shown(share)}: expected the share to keep in 0 < share <= 1, such as 0.125, or times fewer, such as 8x"
        )
    return 1 - kept


def _shown(number: object) -> str:
    return f"{number:g}" if isinstance(number, float) else str(number)
