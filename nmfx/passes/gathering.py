"""Second moments of what a product reads and should give, gathered from batches whose forward passes wait at it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nmfx.passes.lockstep import Call, running
from nmfx.passes.network import Network
from nmfx.passes.samples import Product
from nmfx.sparsity.correction import Moments

ROWS, LEAST_ROWS = 16, 32768  # gathered for each column of a site, and for a site
MOST_COLUMNS = 8192  # second moments of more would take over 256 MiB: these go in blocks


@dataclass(frozen=True)
class Taken:
    """What one batch says of a product.

    Attributes:
        call, target: the product in both networks; `target` is computed.
        shift: what it has to give besides the dense one's output.
        index, batches: which of how many.
    """

    call: Call
    target: Call
    shift: Tensor | None
    index: int
    batches: int

    @property
    def held_back(self) -> bool:
        """Whether it judges, and does not teach."""
        if self.batches >= 8:
            return self.index % 8 == 7
        return 0 < self.index == self.batches - 1


def gather(
    moments: list[Moments],
    taken: Taken,
    seed: int,
    *,
    centre: bool,
    weight: Tensor | None = None,
    columns: slice | None = None,
) -> None:
    """Add what one batch says to `moments`: of the pictures to fit on, and of those held back.

    Args:
        moments: both, or empty before the first batch.
        seed: of the positions that are drawn from large feature maps.
        centre: whether they will be `centred`.
        weight: ``(groups, rows, columns)``; with it, what some `columns` should give is the target: what is left of it
            once all others have given their part.
        columns: to look at; by default all.
    """
    target, product = taken.target, taken.call.tag.product
    pictures = 1 if product.conv is None else len(product.x)
    wanted = math.ceil(max(ROWS * math.prod(product.columns), LEAST_ROWS) / taken.batches / max(1, pictures))
    drawn = None
    if wanted < product.positions:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(product.positions, generator=generator)[:wanted].sort().values.to(product.x.device)
    out = target.out if taken.shift is None else target.out + taken.shift.to(target.out.dtype)
    x, y = product.samples(None, drawn)[0], target.tag.product.samples(out, drawn)[1]
    if columns is not None:
        part = x[..., columns]
        y = y if weight is None else y - x @ weight.mT + part @ weight[..., columns].mT
        x = part
    if not moments:
        moments += [Moments.at(x, y, centre=centre) for _ in range(2)]
    moments[taken.held_back].add(x, y)


@torch.no_grad()
def products_of(network: Network, inputs: Sequence[Any], seed: int = 0) -> Iterator[tuple[str, Product, Moments]]:
    """Each weight's first product in a forward pass: its name, the product, and moments of what it reads and gives.

    Moments are centred where outputs may move by a constant. Weights of too many columns, tables that are read by index, and
    products that give zeros are left out.
    """
    seen = set[Any]()
    with running(network.model, inputs, network.wanted) as runs:
        network.look_ahead(inputs[0])
        while True:
            calls = [run.advance() for run in runs]
            stop = calls[0].tag if calls[0] is not None else None
            if stop is None or any(call is None or call.tag.key != stop.key for call in calls):
                return
            if stop.product is None or stop.key in seen or math.prod(stop.product.columns) > MOST_COLUMNS:
                continue
            seen.add(stop.key)
            moments: list[Moments] = []
            for index, call in enumerate(calls):
                assert call is not None  # as was seen
                call.compute()
                drawn = hash((seed, len(seen), index)) % 2**63
                gather(moments, Taken(call, call, None, index, len(calls)), drawn, centre=network.moves(stop))
            name = str(stop.key[0])
            if moments and name not in network.looked_up:
                both = moments[0] + moments[1]
                both = both.centred() if network.moves(stop) else both
                if both.energy:
                    yield name, stop.product, both
