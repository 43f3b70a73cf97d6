"""Thresholds of DominoSearch: for each group of M weights a magnitude, and how many exceed it, as buffers of the owners."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from nmfx.errors import NmfxError
from nmfx.models.site import Site, Sites, weight_of
from nmfx.sparsity.layout import Grouping
from nmfx.sparsity.select import sort_groups

SUFFIXES = ("_threshold", "_count")


def sorted_magnitudes(weight: Tensor, grouping: Grouping) -> Tensor:
    """Magnitudes of every group in descending order, ``(m, groups)``; short groups are filled up with zeros.

    Rows that share a mask are one group: what counts is the sum of their magnitudes.
    """
    lines = _leading(weight.detach().contiguous(), grouping)
    parts = [sort_groups(block) for block in grouping.leaders.blocks(lines)]
    return torch.cat([nn.functional.pad(part, (0, 0, 0, grouping.m - len(part))) for part in parts], dim=1)


def _leading(weight: Tensor, grouping: Grouping) -> Tensor:
    """The lines that masks are chosen from, but for a sign: weights, or sums of magnitudes over rows that share."""
    values = grouping.sums(weight.abs()).contiguous() if grouping.vector > 1 else weight
    return grouping.leaders.as_lines(values)


def shared_squares(weight: Tensor, grouping: Grouping) -> Tensor:
    """``(m,)``, float64: squared weights at the position of the largest magnitude (or sum over rows) of every group, of the
    second largest, and so on: a mask drops those from N on.
    """
    if grouping.vector == 1:
        return sorted_magnitudes(weight, grouping).square_().sum(dim=1, dtype=torch.float64)
    leaders, weight = grouping.leaders, weight.detach().contiguous()
    squares = leaders.as_lines(grouping.sums(weight.square()).contiguous())
    total = torch.zeros(grouping.m, dtype=torch.float64, device=weight.device)
    for ranked, block in zip(leaders.blocks(_leading(weight, grouping)), leaders.blocks(squares), strict=True):
        order = ranked.argsort(dim=2, descending=True, stable=True)
        total[: block.shape[2]] += block.gather(2, order).sum((0, 1, 3), dtype=torch.float64)
    return total


def exceeding(weight: Tensor, threshold: Tensor, grouping: Grouping) -> Tensor:
    """How many magnitudes of each group exceed its threshold: ``(groups,)``, uint8."""
    lines, counts, start = _leading(weight.detach().abs().contiguous(), grouping), [], 0
    for block in grouping.leaders.blocks(lines):  # (outer, groups, size, inner)
        outer, groups, _, inner = block.shape
        part = threshold[start : start + outer * groups * inner].view(outer, groups, 1, inner)
        counts.append((block > part).sum(dim=2, dtype=torch.uint8).flatten())
        start += part.numel()
    return torch.cat(counts)


def find_thresholds(ordered: Tensor, n: int) -> Tensor:
    """``T_g`` of groups ``(m, groups)`` in descending order: the mean of the lower half of the `n` largest magnitudes.

    A dense group has ``n = M`` (domino.md, 3). Where that half is all zeros, as in a group that was pruned or is short, no
    weight would ever shrink below its mean: the lower half of the non-zero ones counts instead. A group of zeros has nothing
    to lose: infinity.
    """
    threshold = ordered[n - max(1, n // 2) : n].mean(dim=0)
    if not ordered.is_meta and bool((zero := threshold == 0).any()):
        part = ordered[:, zero]
        kept = (part > 0).sum(dim=0)
        half, rank = (kept // 2).clamp_min(1), torch.arange(len(part), device=part.device).unsqueeze(1)
        lower = (rank < kept) & (rank >= kept - half)
        threshold[zero] = (torch.where(lower, part, 0.0).sum(dim=0) / half).masked_fill(kept == 0, torch.inf)
    return threshold


@torch.no_grad()
def attach_thresholds(
    model: nn.Module, sites: Sites, groupings: Mapping[str, Grouping], starts: Mapping[str, int] | None = None
) -> None:
    """Register two non-persistent buffers beside each weight: they move with the model and never reach a state dict.

    - ``weight_threshold`` ``(groups,)``: ``T_g``, the mean of the M/2 smallest magnitudes of each group (domino.md, 3);
    - ``weight_count`` ``(groups,)``, uint8: how many weights of the group exceed ``T_g`` now.

    Args:
        starts: the N that a site starts from, where that is not M (see `find_thresholds`).

    Raises:
        NmfxError: a module already has something under one of the names; nothing is attached then.
    """
    for name in groupings:
        for owner, buffer in _places(model, sites[name]):
            if hasattr(owner, buffer):
                raise NmfxError(
                    f"{name}: the module already has an attribute {buffer!r}; detach() the search before, or rename it"
                )
    for name, grouping in groupings.items():
        ordered = sorted_magnitudes(weight_of(model, sites[name]), grouping)
        threshold = find_thresholds(ordered, (starts or {}).get(name, grouping.m))
        count = (ordered > threshold).sum(dim=0, dtype=torch.uint8)
        for (owner, buffer), value in zip(_places(model, sites[name]), (threshold, count), strict=True):
            owner.register_buffer(buffer, value, persistent=False)


def detach_thresholds(model: nn.Module, sites: Sites, names: Iterable[str] | None = None) -> None:
    """Remove what `attach_thresholds` registered, for these sites or for all."""
    for name in [site.name for site in sites] if names is None else names:
        for owner, buffer in _places(model, sites[name]):
            owner._buffers.pop(buffer, None)
            owner._non_persistent_buffers_set.discard(buffer)


def _places(model: nn.Module, site: Site) -> list[tuple[nn.Module, str]]:
    path, attr = site.owners[0]
    return [(model.get_submodule(path), attr + suffix) for suffix in SUFFIXES]


def thresholds_of(model: nn.Module, site: Site) -> tuple[Tensor, Tensor]:
    """The attached ``(threshold, count)`` of a site, both ``(groups,)``."""
    path, attr = site.owners[0]
    owner = model.get_submodule(path)
    return owner.get_buffer(attr + "_threshold"), owner.get_buffer(attr + "_count")


@contextlib.contextmanager
def thresholds_attached(
    model: nn.Module, sites: Sites, groupings: Mapping[str, Grouping], starts: Mapping[str, int] | None = None
) -> Iterator[None]:
    """`attach_thresholds` for the time of a ``with`` block; they are gone afterwards, whatever happens."""
    attach_thresholds(model, sites, groupings, starts)
    try:
        yield
    finally:
        detach_thresholds(model, sites, groupings)
