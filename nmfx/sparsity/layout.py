"""How a weight is cut into groups of M: along its group axis (strict), or across the flattened tensor (flat); and which of its
rows share a mask."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nmfx.errors import SchemeError
from nmfx.sparsity.pattern import Layout, Pattern

Rows = tuple[int, int, int]  # (outer, length, inner): a weight seen as outer x inner rows of `length` input channels
Outputs = tuple[int, int]  # (run, step): how many adjacent output rows may share a mask, how far apart in memory


@dataclass(frozen=True)
class Grouping:
    """The groups of one weight under one M.

    ``rows = (outer, length, inner)`` with ``outer * length * inner == numel``: entry ``(o, i, k)`` of the weight viewed so
    lies in row ``(o, k)`` at position ``i``. A convolution ``(out, in, kh, kw)`` has rows ``(out, in, kh * kw)``, a linear
    ``(out, in, 1)``: groups run along the input channels (domino.md, section 2).

    In a ``flat`` grouping the rows are laid end to end, channels-last, and groups may cross them, as the published code
    does. Rows that M does not divide end in a short group of ``length % m`` weights.

    ``vector`` adjacent output rows share a mask: at the same place of each, the same positions are kept. What may share is said
    by ``outputs = (run, step)``: a run of outputs (of one group of a convolution, of q) does not share with the next, and the
    last rows of a run that `vector` does not fill share among themselves. By default all outer rows are one run.
    """

    rows: Rows
    m: int
    flat: bool = False
    vector: int = 1
    outputs: Outputs | None = None

    @property
    def run(self) -> Outputs:
        """``outputs``, or their default."""
        outer, length, inner = self.rows
        return self.outputs or (max(1, outer), length * inner)

    @property
    def fits(self) -> bool:
        """Whether runs of outputs fill the rows, and groups of the flat layout lie alike in rows that share."""
        (outer, length, inner), (run, step) = self.rows, self.run
        if run < 1 or step < 1:
            return False
        behind = run * step <= inner and inner % (run * step) == 0
        return (behind or (step == length * inner and outer % run == 0)) and not (self.flat and crossed(self))

    @property
    def leaders(self) -> Grouping:
        """The groups of the first row of every vector alone, as if there were no others."""
        if self.vector == 1:
            return self
        (outer, length, inner), (run, step) = self.rows, self.run
        vectors = -(-run // self.vector)
        if run * step <= inner:  # outputs lie behind the group axis: (in, out), as of transposed convolutions
            return Grouping((outer, length, inner // run * vectors), self.m, self.flat)
        return Grouping((outer // run * vectors, length, inner), self.m, self.flat)

    def lead(self, tensor: Tensor) -> Tensor:
        """The first row of every vector of a tensor, shaped as the rows of `leaders`."""
        run, step = self.run
        return tensor.reshape(-1, run, step)[:, :: self.vector].reshape(self.leaders.rows)

    def sums(self, scores: Tensor) -> Tensor:
        """Sums over the rows of every vector, shaped as the rows of `leaders`; float32 or wider where rows share."""
        if self.vector == 1:
            return scores.reshape(self.rows)
        run, step = self.run
        outputs = scores.reshape(-1, run, step)
        outputs = outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16, torch.bool) else outputs
        total = outputs[:, :: self.vector].clone()
        for row in range(1, self.vector):  # one by one: sums that do not depend on how memory is laid out
            part = outputs[:, row :: self.vector]
            total[:, : part.shape[1]] += part
        return total.reshape(self.leaders.rows)

    def spread(self, leading: Tensor) -> Tensor:
        """To all rows of every vector what its first one has, the inverse of `lead`: shaped as `rows`."""
        if self.vector == 1:
            return leading.reshape(self.rows)
        run, step = self.run
        vectors = leading.reshape(-1, -(-run // self.vector), step)
        return vectors.repeat_interleave(self.vector, dim=1)[:, :run].reshape(self.rows)

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


def group(
    name: str,
    rows: Rows,
    pattern: Pattern,
    layout: Layout = "strict",
    *,
    short: bool = False,
    outputs: Outputs | None = None,
) -> Grouping:
    """The grouping of weight `name` under `pattern`.

    Args:
        rows: ``(outer, length, inner)`` of the weight.
        short: let a row that M does not divide end in a short group (strict layout only).
        outputs: which rows may share a mask (see `Grouping`).

    Returns:
        Groups along rows where M divides them, or end short; across rows in the flat layout.

    Raises:
        SchemeError: the layout cannot cut this weight into groups of M.
    """
    _, length, _ = rows
    shared = (pattern.vector, outputs) if pattern.vector > 1 else (1, None)
    if length % pattern.m == 0 or (layout == "strict" and short):
        return Grouping(rows, pattern.m, False, *shared)
    if layout == "flat":
        grouping = Grouping(rows, pattern.m, True, *shared)
        if (found := crossed(grouping)) is not None:
            raise SchemeError(
                f"{name}: {pattern} in the flat layout needs the number of {found[1]} ({found[0]}) to divide by {pattern.m}; "
                f"leave it dense or choose another M"
            )
        return grouping
    divisors = [d for d in range(2, min(length, 64) + 1) if length % d == 0]
    choice = f"choose M in {', '.join(map(str, divisors))}" if divisors else "no M divides it"
    raise SchemeError(
        f"{name}: {pattern} needs the group axis (in={length}) to divide by {pattern.m}; leave it dense, {choice}, "
        f"or allow a short last group (remainder='short')"
    )


def crossed(grouping: Grouping) -> tuple[int, str] | None:
    """How many weights groups of a flat grouping would have to fill and do not, and of what; None where they do.

    Groups may cross outputs. Where outputs share a mask, their groups have to lie alike, so each must end with its output.
    """
    if grouping.numel % grouping.m:
        return grouping.numel, "weights"
    (_, length, inner), (run, step) = grouping.rows, grouping.run
    an_output = step * length if run * step <= inner else step
    return (an_output, "weights of an output") if grouping.vector > 1 and an_output % grouping.m else None
