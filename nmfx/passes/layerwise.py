"""One network brought back to another, layer after layer, while the forward passes of both wait at the layer's product."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nmfx.errors import NmfxError
from nmfx.passes.fitting import EXACT, Fit, blocks_of, fit, solve
from nmfx.passes.gathering import MOST_COLUMNS, Taken, gather
from nmfx.passes.lockstep import Call, Run, give_back_memory
from nmfx.passes.network import Network, Stop
from nmfx.passes.samples import Product
from nmfx.passes.statistics import match_norm
from nmfx.progress import Progress
from nmfx.sparsity.correction import Moments, Quadratic

LEAST_BATCHES = 8  # that take part from the start; one of them is held back
LEAST_SCALE = 1e-3  # of a batch norm, of its largest one: below it a channel cannot make up for a shortcut
BLOCK = 2048  # columns of a block


@dataclass(frozen=True)
class Corrected:
    """What became of one weight.

    Attributes:
        name: its state-dict key.
        chosen: ``corrected, damping 0.01``, or ``plain`` and why.
        before, after: squared error of the outputs that it makes, on the held-back pictures, as a share of their energy: with
            the dense weights that magnitude keeps, and as it is now.
    """

    name: str
    chosen: str
    before: float = math.nan
    after: float = math.nan

    def __str__(self) -> str:
        errors = "" if math.isnan(self.before) else f", error {self.before:.2%} -> {self.after:.2%}"
        return f"{self.name}: {self.chosen}{errors}"


@dataclass
class LayerwiseCorrection:
    """One job under way."""

    sparse: Network
    dense: Network
    method: str
    seed: int
    batches: int
    memory: float
    progress: Progress
    save: Callable[[int, Sequence[Corrected]], None]  # told after each stop how many are behind, where nothing is half done
    done: int = 0  # stops that an earlier run has left behind
    records: list[Corrected] = field(default_factory=list)
    seen: set[tuple[Any, ...]] = field(default_factory=set)
    shifts: dict[Any, list[Any]] = field(default_factory=dict)  # of what batch norms should read: sums by channel, and how many

    def run(self, runs: Sequence[Run], others: Sequence[Run]) -> None:
        """Go from stop to stop until the forward passes end."""
        joined = 0
        for index, most in enumerate(itertools.chain(self._fitting(), itertools.repeat(self.batches))):
            if index < self.done:
                continue
            for late in range(joined, most):  # runs through what is corrected already
                for _ in range(index):
                    for network, run in ((self.sparse, runs[late]), (self.dense, others[late])):
                        if (call := run.advance()) is not None:
                            self.seen.add(call.tag.key)
                            network.take_shortcut(run, call.tag.key)
                give_back_memory()
            joined = max(joined, most)
            if not self._stop(runs[:joined], others[:joined]):
                return
            if self.seen.issuperset(self.shifts):
                self.save(index + 1, self.records)
            give_back_memory()

    def _fitting(self) -> list[int]:
        """How many batches can wait at each stop, without more bytes of activations than `memory` there or later.

        Feature maps get smaller as a network goes on, and early ones have many positions to fit on: batches that do not fit yet
        start later, and run through the first layers in one go.
        """
        held = [one + other for one, other in zip(self.sparse.live, self.dense.live)]
        worst = list(itertools.accumulate(reversed(held), max))[::-1]
        least = min(self.batches, LEAST_BATCHES)
        return [min(self.batches, max(least, int(self.memory / max(1, size)))) for size in worst]

    def _stop(self, runs: Sequence[Run], others: Sequence[Run]) -> bool:
        """Go on to the next stop, and correct what is there; False at the end."""
        calls: list[tuple[Call, Call]] = []
        keys: set[Any] = set()
        moments: list[Moments] = []
        waiting: list[Taken] = []
        for index, (run, other) in enumerate(zip(runs, others, strict=True)):
            call, target = run.advance(), other.advance()
            keys |= {None if one is None else one.tag.key for one in (call, target)}
            if len(keys) > 1:
                raise NmfxError("correct: the forward passes of the batches, or of dense, take different ways")
            if call is None or target is None:
                continue
            calls.append((call, target))
            target.compute()
            if call.tag.product is not None and call.tag.key not in self.seen:
                taken = Taken(call, target, self._shift(call, target, run, other), index, len(runs))
                if math.prod(call.tag.product.columns) > MOST_COLUMNS:
                    waiting.append(taken)
                else:
                    gather(moments, taken, self._drawn(index), centre=self.sparse.moves(call.tag))
        if not calls:
            return False
        stop, target = calls[0][0].tag, calls[0][1].tag
        if stop.key not in self.seen:
            self.seen.add(stop.key)
            if stop.product is None:
                shift, count = self.shifts.pop(stop.key, (0.0, 1))
                match_norm(stop.mean, stop.variance, [(call.tag.x, other.tag.x) for call, other in calls], shift / count)
            else:
                self._correct(stop, target.product, moments, waiting)
        return True

    def _shift(self, call: Call, target: Call, run: Run, other: Run) -> Tensor | None:
        """What a product has to give besides the dense one's output, for the sum with its shortcut to be the dense one's."""
        key = call.tag.key
        own, wanted = self.sparse.take_shortcut(run, key), self.dense.take_shortcut(other, key)
        if own is None or wanted is None:
            return None
        follower, lost = self.sparse.followers[key], (wanted - own).float()
        if follower.norm is None:
            return lost.reshape(target.out.shape)
        weight, variance, eps = follower.scale
        scale = (variance.float() + eps).rsqrt() * (1.0 if weight is None else weight.float())
        inverse = torch.where(scale.abs() > LEAST_SCALE * scale.abs().max(), 1 / scale, 0.0)
        lost = lost * inverse.view(-1, *[1] * (lost.dim() - 2))
        total = self.shifts.setdefault(follower.norm, [0.0, 0])
        total[0] = total[0] + lost.transpose(0, 1).flatten(1).sum(1, dtype=torch.float64)
        total[1] += lost.numel() // lost.shape[1]
        return lost

    def _correct(self, stop: Stop, dense: Product, moments: list[Moments], waiting: list[Taken]) -> None:
        """Choose the values of one weight, and write them to where the waiting runs will read them."""
        name, product = str(stop.key[0]), stop.product
        assert product is not None
        spec = self.sparse.specs.get(name)
        spec = None if spec is None or spec.derived else spec
        blocks = blocks_of(product, spec, BLOCK) if waiting else []
        if waiting:
            moments = self._sums(stop, waiting, None, slice(0, 0))
        if why := self._spoken_against(name, stop, moments, blocks if waiting else None):
            self.records.append(Corrected(name, f"plain: {why}"))
            return
        weight, wanted = product.matrix(product.weight).float(), dense.matrix(dense.weight).float()

        def solver(problem: Quadratic, columns: slice | None = None) -> Tensor:
            if spec is None:
                return problem.optimum.float()
            target = wanted if columns is None else wanted[..., columns]
            return solve(self.method, problem, target, product, self.sparse.weights[name], spec, columns)

        if waiting:
            found = self._fit_blocks(stop, waiting, moments, blocks, weight, wanted, solver)
        else:
            found = fit(self._centred(stop, moments), weight, wanted, solver)
        exact = found.before < EXACT
        product.weight.copy_(product.tensor(found.weight))
        bias, follower = self.sparse.own_bias(product), self.sparse.followers.get(stop.key)
        if bias is not None and not exact and (follower is None or follower.norm is None):
            left = self._sums(stop, waiting, found.weight, slice(0, 0)) if waiting else moments
            x, y = (left[0] + left[1]).means
            assert dense.bias is not None  # as the sparse network's
            now = product.matrix(product.weight).float()[..., : x.shape[-1]]
            bias.copy_(dense.bias + (y - x @ now.mT).flatten())
        chosen = "plain: its outputs are right" if exact else "plain: nothing is better on the held-back pictures"
        if found.damping is not None:
            in_blocks = f" at most, in {len(blocks)} blocks of columns" if waiting else ""
            chosen = f"corrected, damping {found.damping:g}{in_blocks}"
        self.records.append(Corrected(name, chosen, found.before, found.after))
        self.progress(len(self.records) / len(self.sparse.weights), str(self.records[-1]))

    def _spoken_against(self, name: str, stop: Stop, moments: list[Moments], blocks: list[slice] | None) -> str:
        """Why a weight cannot be corrected; empty if it can."""
        if blocks == []:
            return f"more than {MOST_COLUMNS} columns, in groups that cross rows"
        if not moments or not moments[0].samples:
            return "no pictures reach it"
        if not moments[1].samples:
            return "no pictures can be held back; give more"
        if not self._centred(stop, moments)[0].energy:
            return "it gives zeros at its first use"
        return "it is a table as well, read by index" if name in self.sparse.looked_up else ""

    def _centred(self, stop: Stop, moments: Sequence[Moments]) -> tuple[Moments, Moments]:
        """Moments about means where outputs may move."""
        fitted, held = moments
        return (fitted.centred(), held.centred()) if self.sparse.moves(stop) else (fitted, held)

    def _drawn(self, index: int) -> int:
        """The seed of the positions of one batch at this stop."""
        return hash((self.seed, len(self.seen), index)) % 2**63

    def _sums(self, stop: Stop, waiting: list[Taken], weight: Tensor | None, columns: slice) -> list[Moments]:
        """Moments of all batches; see `gather`."""
        moments, centre = list[Moments](), self.sparse.moves(stop)
        for taken in waiting:
            gather(moments, taken, self._drawn(taken.index), centre=centre, weight=weight, columns=columns)
        return moments

    def _fit_blocks(
        self,
        stop: Stop,
        waiting: list[Taken],
        outputs: Sequence[Moments],
        blocks: Sequence[slice],
        weight: Tensor,
        dense: Tensor,
        solver: Callable[..., Tensor],
    ) -> Fit:
        """Block after block of columns, each making up for what all others leave as they are by then.

        At a time there are second moments of one block (five of `BLOCK` squared numbers, 80 MiB, while they are factorised),
        and of one batch the inputs at the positions that are looked at.
        """
        whole, weight = self._centred(stop, outputs)[1].energy, weight.clone()
        dampings, errors = list[float](), list[float]()
        for columns in blocks:
            moments = self._centred(stop, self._sums(stop, waiting, weight, columns))
            found = fit(moments, weight[..., columns], dense[..., columns], functools.partial(solver, columns=columns))
            weight[..., columns] = found.weight
            dampings += [] if found.damping is None else [found.damping]
            errors += [error * moments[1].energy / max(whole, 1e-30) for error in (found.before, found.after)]
        return Fit(weight, max(dampings, default=None), errors[0], errors[-1])
