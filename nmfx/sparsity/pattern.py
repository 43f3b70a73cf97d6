"""The N:M pattern: N weights kept in each group of M consecutive ones, the same ones in V adjacent output rows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from nmfx.errors import PatternError

Layout = Literal["strict", "flat"]  # groups within rows of input channels, or across them
Remainder = Literal["dense", "smaller", "short"]  # what becomes of rows that M does not divide
MAX_M = 64  # a group's choice must fit one signed 64-bit integer when packed
VECTORS = (1, 2, 4, 8)  # rows that may share a mask: what registers of a CPU hold


@dataclass(frozen=True, init=False)
class Pattern:
    """``Pattern("4:16")`` keeps 4 weights of every 16; ``Pattern(4, 16)`` is the same value.

    N counts the weights *kept*, 1 <= N <= M <= 64; M:M is dense. ``Pattern("4:16x4")``, or ``Pattern(4, 16, 4)``, keeps the
    same 4 of 16 in V = 4 adjacent output rows (see `Grouping`): every group still is 4:16.

    Raises:
        PatternError: the text is not ``N:M`` or ``N:MxV``, or the numbers are out of range.
    """

    n: int
    m: int
    vector: int = 1

    DENSE: ClassVar[Pattern]

    def __init__(self, n: str | int | Pattern, m: int | None = None, vector: int | None = None) -> None:
        text = f"{n}{'' if m is None else f':{m}'}{'' if vector is None else f'x{vector}'}"
        if (match := re.fullmatch(r"\s*(\d{1,3})\s*:\s*(\d{1,3})\s*(?:x\s*(\d{1,3})\s*)?", text)) is None:
            raise PatternError(
                f"{text!r} is not an N:M pattern; write N kept weights, a colon, M, as in '2:4', "
                f"or '2:4x4' for one mask of 4 rows"
            )
        n, m, vector = int(match[1]), int(match[2]), int(match[3] or 1)
        if not 1 <= n <= m <= MAX_M:
            hint = f"; did you mean '{m}:{n}'? N, the weights kept, comes first" if 1 <= m < n <= MAX_M else ""
            raise PatternError(f"{text!r}: expected 1 <= N <= M <= {MAX_M}{hint}")
        if vector not in VECTORS:
            known = ", ".join(map(str, VECTORS))
            raise PatternError(f"{text!r}: {vector} rows cannot share a mask; V, after the x, is one of {known}")
        object.__setattr__(self, "n", n)
        object.__setattr__(self, "m", m)
        object.__setattr__(self, "vector", vector)

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

    @property
    def order(self) -> tuple[float, int, int]:
        """What patterns are sorted by: the sparsest first."""
        return self.density, self.m, self.vector

    def __str__(self) -> str:
        return f"{self.n}:{self.m}{f'x{self.vector}' if self.vector > 1 else ''}"

    def __repr__(self) -> str:
        return f"Pattern('{self}')"


Pattern.DENSE = Pattern(1, 1)
