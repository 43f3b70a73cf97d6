"""Selection networks: the n-th largest of every group without sorting it.

A comparator network runs the same min/max pairs on all groups at once, so that each step is one vectorised operation over
a slice of memory that fits the cache. Batcher's odd-even merge sort gives the pairs; the comparators that no wanted output
depends on are left out (for the 4th and 5th largest of 16: 49 of 63).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

CHUNK = 1 << 15  # groups a pass: 16 x 32k floats = 2 MB stay in the second-level caches of two cores


def _sort_pairs(size: int) -> Iterator[tuple[int, int]]:
    """Comparators of Batcher's odd-even merge sort for `size` inputs, a power of two."""
    p = 1
    while p < size:
        k = p
        while k >= 1:
            for j in range(k % p, size - k, 2 * k):
                for i in range(j, min(j + k, size - k)):
                    if i // (2 * p) == (i + k) // (2 * p):
                        yield i, i + k
            k //= 2
        p *= 2


@cache
def network(size: int, wanted: tuple[int, ...]) -> tuple[tuple[int, int, bool, bool], ...]:
    """Comparators ``(a, b, need_max, need_min)`` that bring the `wanted` ranks (0 = largest) of `size` inputs in place.

    A comparator puts the larger of wires a < b on a. Wires past `size` would hold minus infinity and never move up, so
    their comparators are dropped.
    """
    needed, steps = set(wanted), []
    for a, b in reversed(list(_sort_pairs(1 << max(size - 1, 0).bit_length()))):
        if b < size and (a in needed or b in needed):
            steps.append((a, b, a in needed, b in needed))
            needed |= {a, b}
    return tuple(reversed(steps))


def run(rows: list[Tensor], ranks: tuple[int, ...], spare: Tensor) -> list[Tensor]:
    """Apply the network for `ranks` to `rows` (one tensor per position in the group, all of one shape), in place.

    Returns:
        The rows reordered; row r holds the r-th largest for every wanted rank r. Other rows hold leftovers.
    """
    for a, b, need_max, need_min in network(len(rows), ranks):
        if need_max and need_min:
            torch.minimum(rows[a], rows[b], out=spare)
            torch.maximum(rows[a], rows[b], out=rows[a])
            rows[b], spare = spare, rows[b]
        elif need_max:
            torch.maximum(rows[a], rows[b], out=rows[a])
        else:
            torch.minimum(rows[a], rows[b], out=rows[b])
    return rows


def sort_groups(block: Tensor) -> Tensor:
    """Magnitudes of every group in descending order.

    Args:
        block: weights ``(outer, groups, size, inner)``.

    Returns:
        ``(size, outer * groups * inner)``, row r the r-th largest magnitude of each group, in float32 or wider.
    """
    rows = block.abs().movedim(2, 0).flatten(1)  # size, groups
    rows = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
    size, count = rows.shape
    result = torch.empty_like(rows)
    spare = rows.new_empty(min(CHUNK, count))
    for start in range(0, count, CHUNK):
        part = rows[:, start : start + CHUNK].contiguous()
        ordered = run(list(part.unbind(0)), tuple(range(size)), spare[: part.shape[1]])
        torch.stack(ordered, out=result[:, start : start + CHUNK])
    return result
