"""How a weight is cut into groups of M: along its group axis (strict), or across the flattened tensor (flat)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from nmfx.errors import SchemeError
from nmfx.sparsity.pattern import Layout, Pattern

Rows = tuple[int, int, int]  # (outer, length, inner): a weight seen as outer x inner rows of `length` input channels


@dataclass(frozen=True)
class Grouping:
    """The groups of one weight under one M.

    ``rows = (outer, length, inner)`` with ``outer * length * inner == numel``: entry ``(o, i, k)`` of the weight viewed so
    lies in row ``(o, k)`` at position ``i``. A convolution ``(out, in, kh, kw)`` has rows ``(out, in, kh * kw)``, a linear
    ``(out, in, 1)``: groups run along the input channels (domino.md, section 2).

    In a ``flat`` grouping the rows are laid end to end, channels-last, and groups may cross them, as the published code
    does. Rows that M does not divide end in a short group of ``length % m`` weights.
    """

    rows: Rows
    m: int
    flat: bool = False

    @property
    def numel(self) -> int:
        """Weights in the tensor."""
        return math.prod(self.rows)

    @property
    def lines(self) -> Rows:
        """The rows that groups are cut from: ``rows`` itself, or the whole tensor as one row when flat."""
        return (1, self.numel, 1) if self.flat else self.rows

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """``(number of groups, weights in each)`` of the full groups, then of the short last groups if there are any."""
        outer, length, inner = self.lines
        full, rest = divmod(length, self.m)
        return [(outer * inner * full, self.m)] * (full > 0) + [(outer * inner, rest)] * (rest > 0)

    @property
    def groups(self) -> int:
        """Number of groups, short ones included."""
        return sum(count for count, _ in self.sizes)

    def kept(self, n: int) -> int:
        """Weights kept at N = n; a short group of r weights keeps min(n, r)."""
        return sum(count * min(n, size) for count, size in self.sizes)

    def as_lines(self, tensor: Tensor) -> Tensor:
        """`tensor` as ``(outer, length, inner)``: a view where groups follow its axes, a channels-last copy when flat."""
        if not self.flat:
            return tensor.view(self.rows)
        return tensor.reshape(self.rows).movedim(1, 2).reshape(self.lines)

    def from_lines(self, lines: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The inverse of `as_lines`: a tensor of `shape`."""
        outer, length, inner = self.rows
        if self.flat:
            lines = lines.reshape(outer, inner, length).movedim(2, 1)
        return lines.reshape(shape)

    def blocks(self, lines: Tensor) -> list[Tensor]:
        """Views ``(outer, groups, size, inner)`` of `lines`: the full groups, then the short last ones."""
        _, length, _ = self.lines
        full = length - length % self.m
        parts = [lines[:, :full].unflatten(1, (-1, self.m))] if full else []
        return parts + ([lines[:, full:].unsqueeze(1)] if full < length else [])


def group(name: str, rows: Rows, pattern: Pattern, layout: Layout = "strict", *, short: bool = False) -> Grouping:
    """The grouping of weight `name` under `pattern`.

    Args:
        rows: ``(outer, length, inner)`` of the weight.
        short: let a row that M does not divide end in a short group (strict layout only).

    Returns:
        Groups along rows where M divides them, or end short; across rows in the flat layout.

    Raises:
        SchemeError: the layout cannot cut this weight into groups of M.
    """
    _, length, _ = rows
    if length % pattern.m == 0 or (layout == "strict" and short):
        return Grouping(rows, pattern.m)
    if layout == "flat":
        if (numel := math.prod(rows)) % pattern.m:
            raise SchemeError(
                f"{name}: {pattern} in the flat layout needs the number of weights ({numel}) to divide by {pattern.m}; "
                f"leave it dense or choose another M"
            )
        return Grouping(rows, pattern.m, flat=True)
    divisors = [d for d in range(2, min(length, 64) + 1) if length % d == 0]
    choice = f"choose M in {', '.join(map(str, divisors))}" if divisors else "no M divides it"
    raise SchemeError(
        f"{name}: {pattern} needs the group axis (in={length}) to divide by {pattern.m}; leave it dense, {choice}, "
        f"or allow a short last group (remainder='short')"
    )
