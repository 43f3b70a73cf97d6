"""Weight -> mask: exactly N kept in every group, those of the highest scores, the earlier position on ties.

Where rows share a mask, scores are the sums over them, and one row of each vector is masked for all (see `Grouping`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nmfx.errors import NmfxError, VerificationError
from nmfx.sparsity import select
from nmfx.sparsity.layout import Grouping
from nmfx.sparsity.score import SCORES


def top_mask(score: Tensor, n: int, dim: int) -> Tensor:
    """Mask of the `n` largest scores along `dim`; on ties the earlier position is kept, and NaN counts as largest.

    The plain statement of what a mask is: the fast paths below fall back to it, and torch.compile gets it.
    """
    order = torch.argsort(score, dim=dim, descending=True, stable=True)
    kept = order.narrow(dim, 0, min(n, score.shape[dim]))
    return torch.zeros_like(score, dtype=torch.bool).scatter(dim, kept, torch.ones_like(kept, dtype=torch.bool))


def score_weights(weight: Tensor, grouping: Grouping, score: str, evidence: Tensor | None) -> Tensor:
    """Scores shaped as `weight`; the arguments are those of `make_mask`."""
    if evidence is None and SCORES[score].needs != "nothing":
        raise NmfxError(f"score {score!r} ranks by {SCORES[score].needs} too, and here are none: give transform data=")
    rows = weight.detach().reshape(grouping.rows)
    return SCORES[score].function(rows, rows if evidence is None else evidence).reshape(weight.shape)


def make_mask(weight: Tensor, n: int, grouping: Grouping, score: str = "magnitude", evidence: Tensor | None = None) -> Tensor:
    """The mask that keeps the `n` highest scores of every group (domino.md, sections 2 and 4).

    Args:
        weight: floats of any type.
        n: weights to keep in a group.
        grouping: how `weight` is cut into groups.
        score: one of `nmfx.sparsity.score.SCORES`.
        evidence: what the score needs, broadcastable to ``grouping.rows``.

    Returns:
        Bool, shaped as `weight`, contiguous, true = kept.

    Raises:
        NmfxError: the score needs evidence, and there is none.
    """
    leaders, scores = grouping.leaders, grouping.sums(score_weights(weight, grouping, score, evidence))
    masks = [top_mask(block, n, dim=2).flatten(1, 2) for block in leaders.blocks(leaders.as_lines(scores.contiguous()))]
    mask = leaders.from_lines(torch.cat(masks, dim=1), leaders.rows)
    return grouping.spread(mask).reshape(weight.shape).contiguous()


@torch.no_grad()
def update_mask(
    weight: Tensor, n: int, grouping: Grouping, mask: Tensor, masked: Tensor, score: str = "magnitude",
    evidence: Tensor | None = None,
) -> None:  # fmt: skip
    """Recompute `mask` and ``masked = where(mask, weight, 0)`` in place, in one pass over the weight.

    Near the cost of reading and writing the three tensors: no sort, and scratch memory of a few cache-sized chunks.

    Args:
        weight, n, grouping, score, evidence: as in `make_mask`.
        mask: bool, shaped and strided as `weight`.
        masked: of `weight`'s dtype, shaped and strided as `weight`.

    Raises:
        NmfxError: as `make_mask` does.
    """
    if grouping.vector > 1:
        scores = grouping.sums(score_weights(weight, grouping, score, evidence))
        leading = torch.empty_like(scores, dtype=torch.bool)
        update_mask(scores, n, grouping.leaders, leading, torch.empty_like(scores))
        mask.copy_(grouping.spread(leading).reshape(mask.shape))
        torch.where(mask, weight, weight.new_zeros(()), out=masked)
    elif score != "magnitude":  # the magnitudes of the scores, which are 0 or more
        scores = score_weights(weight, grouping, score, evidence)
        update_mask(scores, n, grouping, mask, torch.empty_like(scores))
        torch.where(mask, weight, weight.new_zeros(()), out=masked)
    elif grouping.flat:  # groups do not follow the axes: work on a reordered copy (the stem and little else)
        lines = grouping.as_lines(weight)
        line_mask, line_masked = torch.empty_like(lines, dtype=torch.bool), torch.empty_like(lines)
        _update_blocks(lines, n, grouping, line_mask, line_masked)
        mask.copy_(grouping.from_lines(line_mask, tuple(mask.shape)))
        masked.copy_(grouping.from_lines(line_masked, tuple(mask.shape)))
    else:
        _update_blocks(*(grouping.as_lines(weight), n, grouping, grouping.as_lines(mask), grouping.as_lines(masked)))


BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers of a float's width


def _update_blocks(lines: Tensor, n: int, grouping: Grouping, mask: Tensor, masked: Tensor) -> None:
    for block, block_mask, block_masked in zip(*map(grouping.blocks, (lines, mask, masked)), strict=True):
        outer, count, size, inner = block.shape
        if size <= n:
            block_mask.fill_(True)
            block_masked.copy_(block)
            continue
        step = min(max(1, select.CHUNK // (count * inner)), outer)
        ranks, spare = block.new_empty(size, step, count, inner), block.new_empty(step, count, inner)
        magnitude, dropped = block.new_empty(2, step, count, size, inner).unbind()
        bits = block.new_empty(step, count, size, inner, dtype=BITS[block.element_size()])
        for start in range(0, outer, step):
            part, end = block[start : start + step], min(step, outer - start)
            a, drop, kept = torch.abs(part, out=magnitude[:end]), dropped[:end], bits[:end]
            rows = ranks[:, :end].copy_(a.movedim(2, 0))
            ranked = select.run(list(rows.unbind(0)), (n - 1, n), spare[:end])
            # Comparisons into a float, and an AND of bits, run at the speed of memory; bool results and where() do not.
            torch.lt(a, ranked[n - 1].unsqueeze(2), out=drop)
            # A threshold keeps more than n where the n-th and the next are equal, and everything where one is NaN.
            tied = ~(ranked[n] < ranked[n - 1])
            if tied.any():
                at = tied.nonzero(as_tuple=True)
                where = (at[0], at[1], slice(None), at[2])
                drop[where] = (~top_mask(a[where], n, dim=1)).to(drop.dtype)
            kept.copy_(drop.sub_(1))  # 1 - 1 = 0 where dropped, 0 - 1 = -1, all bits set, where kept
            block_mask[start : start + step].copy_(drop)
            torch.bitwise_and(part.view(kept.dtype), kept, out=block_masked[start : start + step].view(kept.dtype))


def check_groups(name: str, weight: Tensor, n: int, grouping: Grouping) -> int:
    """Number of groups of `weight`, after checking that each holds at most `n` non-zeros, and those of shared rows together.

    Raises:
        VerificationError: naming the first group that holds more.
    """
    nonzero, checked = weight.detach().contiguous() != 0, 0
    for block in grouping.blocks(grouping.as_lines(nonzero)):
        if found := _overfull(block, n):
            index, row, count = found
            raise VerificationError(
                f"{name}: group {index} of row {row} holds {count} non-zeros, expected at most {n} of {block.shape[2]}"
            )
        checked += block.numel() // block.shape[2]
    leaders = grouping.leaders
    for block in leaders.blocks(leaders.as_lines(grouping.sums(nonzero) != 0)) if grouping.vector > 1 else ():
        if found := _overfull(block, n):
            index, row, count = found
            raise VerificationError(
                f"{name}: group {index} of vector {row}, {grouping.vector} rows that share a mask, has non-zeros at {count} "
                f"positions, expected at most {n} of {block.shape[2]}, the same ones in each row"
            )
    return checked


def _overfull(block: Tensor, n: int) -> tuple[int, int, int] | None:
    """``(group, row, count)`` of the first group of a bool block ``(outer, groups, size, inner)`` that holds more than `n`."""
    counts = block.sum(dim=2)  # outer, groups, inner
    if not (bad := (counts > n).nonzero()).numel():
        return None
    outer, index, inner = bad[0].tolist()
    return index, outer * counts.shape[2] + inner, int(counts[outer, index, inner])
