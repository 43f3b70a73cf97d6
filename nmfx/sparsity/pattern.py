"""The N:M pattern: N weights kept in each group of M consecutive ones."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from nmfx.errors import PatternError

Layout = Literal["strict", "flat"]  # groups within rows of input channels, or across them
Remainder = Literal["dense", "smaller", "short"]  # what becomes of rows that M does not divide
MAX_M = 64  # a group's choice must fit one signed 64-bit integer when packed


@dataclass(frozen=True, init=False)
class Pattern:
    """``Pattern("4:16")`` keeps 4 weights of every 16; ``Pattern(4, 16)`` is the same value.

    N counts the weights *kept*, 1 <= N <= M <= 64; M:M is dense.

    Raises:
        PatternError: the text is not ``N:M``, or the numbers are out of range.
    """

    n: int
    m: int

    DENSE: ClassVar[Pattern]

    def __init__(self, n: str | int | Pattern, m: int | None = None) -> None:
        text = f"{n}" if m is None else f"{n}:{m}"
        if (match := re.fullmatch(r"\s*(\d{1,3})\s*:\s*(\d{1,3})\s*", text)) is None:
            raise PatternError(f"{text!r} is not an N:M pattern; write N kept weights, a colon, M, as in '2:4'")
        n, m = int(match[1]), int(match[2])
        if not 1 <= n <= m <= MAX_M:
            hint = f"; did you mean '{m}:{n}'? N, the weights kept, comes first" if 1 <= m < n <= MAX_M else ""
            raise PatternError(f"{text!r}: expected 1 <= N <= M <= {MAX_M}{hint}")
        object.__setattr__(self, "n", n)
        object.__setattr__(self, "m", m)

    @property
    def density(self) -> float:
        """Share of weights kept, N / M."""
        return self.n / self.m

    @property
    def sparsity(self) -> float:
        """Share of weights dropped, 1 - N / M."""
        return 1 - self.n / self.m

    @property
    def is_dense(self) -> bool:
        """True when every weight is kept (M:M)."""
        return self.n == self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def __repr__(self) -> str:
        return f"Pattern('{self}')"


Pattern.DENSE = Pattern(1, 1)
