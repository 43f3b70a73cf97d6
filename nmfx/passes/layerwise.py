"""One network brought back to another, layer after layer, while the forward passes of both wait at the layer's product."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nmfx.errors import NmfxError
from nmfx.masking.copies import deep_copy
from nmfx.masking.owner import masks_derived, unmask
from nmfx.masking.weight import MaskSpec
from nmfx.models.storages import LOOKUPS, storage_of
from nmfx.passes.lockstep import Call, Run, give_back_memory, running, sharing_copy
from nmfx.passes.lookahead import Follower, look_ahead
from nmfx.passes.samples import Product, product_of
from nmfx.passes.statistics import variance_ratio
from nmfx.progress import Progress, silent
from nmfx.sparsity.correction import CORRECTIONS, Moments, Quadratic, Scaled, Selection, fit_kept
from nmfx.sparsity.mask import make_mask

NORMS = {  # operations that normalise by running statistics, and where the running mean is among their arguments
    "aten::native_batch_norm": 3,
    "aten::_native_batch_norm_legit_no_training": 3,
    "aten::cudnn_batch_norm": 3,
    "aten::miopen_batch_norm": 3,
}
DAMPINGS = (0.01, 0.1, 1.0)  # tried in this order until the held-back pictures agree with the others
AGREE = 1.25  # how much larger the error on held-back pictures may be
ROWS, LEAST_ROWS = 16, 32768  # gathered for each column of a site, and for a site
LEAST_BATCHES = 8  # that take part from the start; one of them is held back
EXACT = 1e-6  # an error that is rounding
LEAST_SCALE = 1e-3  # of a batch norm, of its largest one: below it a channel cannot make up for a shortcut
MOST_COLUMNS = 8192  # second moments of more would take over 256 MiB


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


@dataclass(frozen=True)
class Stop:
    """Where a run waits: at a product that reads a weight, or at a batch norm.

    Attributes:
        key: tells one from another; the same in both networks.
        product: of a weight.
        mean, variance, x: of a batch norm, and its input.
    """

    key: tuple[Any, ...]
    product: Product | None = None
    mean: Tensor | None = None
    variance: Tensor | None = None
    x: Tensor | None = None


class Network:
    """A copy to run, and its weights by name: without masks, but for those on what a module makes of its weight.

    Args:
        keep_derived: whether those stay.
    """

    def __init__(self, model: nn.Module, specs: dict[str, MaskSpec], *, keep_derived: bool = False) -> None:
        self.model = deep_copy(model).eval()
        for module in self.model.modules():
            if not (keep_derived and masks_derived(module)):
                unmask(module, keep_masked=False)
        self.specs = specs
        self.weights: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.dim() > 1 and parameter.is_floating_point():
                parameter.data = parameter.data.contiguous()
                self.weights[name] = parameter.data
        self._names = {storage_of(weight): name for name, weight in self.weights.items()}
        self.biases = {name: p.data for name, p in self.model.named_parameters() if p.dim() == 1 and p.is_floating_point()}
        self._bias_storages = {storage_of(bias) for bias in self.biases.values()}
        self.followers: dict[Any, Follower] = {}
        self.keep, self.live = set[int](), list[int]()
        self.looked_up = set[str]()
        self._norms = {storage_of(buffer): name for name, buffer in self.model.named_buffers()}

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Shapes of all weights."""
        return {name: weight.shape for name, weight in self.weights.items()}

    def look_ahead(self, x: Any) -> None:
        """See in one forward pass what follows each product, which results runs have to keep for it, and how much they hold."""
        seen = look_ahead(sharing_copy(self.model), x, self.wanted, NORMS)
        self.followers, self.live = seen.followers, seen.live
        self.keep |= {one.shortcut for one in self.followers.values() if one.shortcut is not None}

    def take_shortcut(self, run: Run, key: Any) -> Tensor | None:
        """What one run has kept of the shortcut that the product of `key` is added to; it is kept no longer."""
        follower = self.followers.get(key)
        return None if follower is None or follower.shortcut is None else run.kept.pop(follower.shortcut, None)

    def own_bias(self, product: Product) -> Tensor | None:
        """The parameter that a product adds, one number an output channel; None where it adds none of its own."""
        bias = product.bias
        if bias is None or bias.dim() != 1 or len(bias) != product.groups * product.rows:
            return None
        return bias if storage_of(bias) in self._bias_storages else None

    def wanted(self, name: str, args: Any) -> Stop | None:
        """What `Run` asks of every operation."""
        if (place := NORMS.get(name)) is not None:
            mean, variance = args[place], args[place + 1]
            if isinstance(mean, Tensor) and storage_of(mean) in self._norms and args[place + 2] is not True:
                return Stop((self._norms[storage_of(mean)],), None, mean, variance, args[0])
            return None
        if name.removeprefix("aten::") in LOOKUPS and isinstance(args[0], Tensor) and storage_of(args[0]) in self._names:
            self.looked_up.add(self._names[storage_of(args[0])])
        product = product_of(name, args, lambda t: storage_of(t) in self._names)
        if product is None:
            return None
        weight = product.weight
        part = (weight.storage_offset(), tuple(weight.shape), weight.stride())
        return Stop((self._names[storage_of(weight)], *part), product)


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
    records: list[Corrected] = field(default_factory=list)
    seen: set[tuple[Any, ...]] = field(default_factory=set)
    shifts: dict[Any, list[Any]] = field(default_factory=dict)  # of what batch norms should read: sums by channel, and how many

    def run(self, runs: Sequence[Run], others: Sequence[Run]) -> None:
        """Go from stop to stop until the forward passes end."""
        joined = 0
        for index, most in enumerate(itertools.chain(self._fitting(), itertools.repeat(self.batches))):
            for late in range(joined, most):  # runs through what is corrected already
                for _ in range(index):
                    for network, run in ((self.sparse, runs[late]), (self.dense, others[late])):
                        if (call := run.advance()) is not None:
                            network.take_shortcut(run, call.tag.key)
                give_back_memory()
            joined = max(joined, most)
            if not self._stop(runs[:joined], others[:joined]):
                return
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
                self._gather(moments, call, target, self._shift(call, target, run, other), (index, len(runs)))
        if not calls:
            return False
        stop, target = calls[0][0].tag, calls[0][1].tag
        if stop.key not in self.seen:
            self.seen.add(stop.key)
            if stop.product is None:
                shift, count = self.shifts.pop(stop.key, (0.0, 1))
                _match(stop, [(call.tag.x, other.tag.x) for call, other in calls], shift / count)
            else:
                self._correct(stop, target.product, moments)
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

    def _moves(self, stop: Stop) -> bool:
        """Whether a product's outputs may move by a constant for each channel: a batch norm or a bias takes it up."""
        follower = self.sparse.followers.get(stop.key)
        if follower is not None and follower.norm is not None:
            return True
        return stop.product is not None and self.sparse.own_bias(stop.product) is not None

    def _gather(self, moments: list[Moments], call: Call, target: Call, shift: Tensor | None, which: tuple[int, int]) -> None:
        """Add what one batch says to `moments`: of the pictures to fit on, and of those held back."""
        product: Product = call.tag.product
        columns = math.prod(product.columns)
        if columns > MOST_COLUMNS:
            return
        pictures = 1 if product.conv is None else len(product.x)
        index, batches = which
        wanted = math.ceil(max(ROWS * columns, LEAST_ROWS) / batches / max(1, pictures))
        drawn = None
        if wanted < product.positions:
            generator = torch.Generator().manual_seed(hash((self.seed, len(self.seen), index)) % 2**63)
            drawn = torch.randperm(product.positions, generator=generator)[:wanted].sort().values.to(product.x.device)
        held_back = index % 8 == 7 if batches >= 8 else index and index == batches - 1
        out = target.out if shift is None else target.out + shift.to(target.out.dtype)
        x, y = product.samples(None, drawn)[0], target.tag.product.samples(out, drawn)[1]
        if not moments:
            moments += [Moments.at(x, y, centre=self._moves(call.tag)) for _ in range(2)]
        moments[bool(held_back)].add(x, y)

    def _correct(self, stop: Stop, dense: Product, moments: list[Moments]) -> None:
        """Choose the values of one weight, and write them to where the waiting runs will read them."""
        name, product = str(stop.key[0]), stop.product
        assert product is not None
        if not moments or not moments[0].samples:
            why = f"more than {MOST_COLUMNS} columns" if not moments else "no pictures reach it"
            self.records.append(Corrected(name, f"plain: {why}"))
            return
        both = moments[0] + moments[1]
        fitted, held, whole = (one.centred() if self._moves(stop) else one for one in (*moments, both))
        if not held.samples:
            self.records.append(Corrected(name, "plain: no pictures can be held back; give more"))
            return
        if not fitted.energy:
            self.records.append(Corrected(name, "plain: it gives zeros at its first use"))
            return
        if name in self.sparse.looked_up:
            self.records.append(Corrected(name, "plain: it is a table as well, read by index"))
            return
        weight, wanted = product.matrix(product.weight).float(), dense.matrix(dense.weight).float()
        before = after = held.error(weight)
        best, used = weight, math.nan
        exact, scaled = before < EXACT, Scaled(fitted)
        for damping in () if exact else DAMPINGS:
            spec = self.sparse.specs.get(name)
            problem = Quadratic.of(scaled, wanted, damping)
            if spec is None or spec.derived:
                found = problem.optimum.float()
            else:
                found = solve(self.method, problem, wanted, product, self.sparse.weights[name], spec)
            error = held.error(found)
            if error < after:
                best, used, after = found, damping, error
            if error <= AGREE * fitted.error(found):
                break
        chosen = f"corrected, damping {used:g}"
        if math.isnan(used):
            chosen = "plain: its outputs are right" if exact else "plain: nothing is better on the held-back pictures"
        if not math.isnan(used):  # the held-back pictures have judged; now they may teach as well
            best = fit_kept(Quadratic.of(Scaled(whole), wanted, used), best != 0, best)
        product.weight.copy_(product.tensor(best))
        bias, follower = self.sparse.own_bias(product), self.sparse.followers.get(stop.key)
        if bias is not None and not exact and (follower is None or follower.norm is None):
            x, y = both.means
            assert dense.bias is not None  # as the sparse network's
            bias.copy_(dense.bias + (y - x @ product.matrix(product.weight).float().mT).flatten())
        self.records.append(Corrected(name, chosen, before, after))
        self.progress(len(self.records) / len(self.sparse.weights), str(self.records[-1]))


def solve(method: str, problem: Quadratic, dense: Tensor, product: Product, whole: Tensor, spec: MaskSpec) -> Tensor:
    """The values that a method finds for what a product reads of a masked weight.

    Args:
        method: one of `CORRECTIONS`.
        problem: the loss to make small.
        dense: the dense values, ``(groups, rows, columns)``.
        product: reads `whole`, or a part of it.
        whole: the weight.
        spec: pattern and groups of the whole weight.

    Returns:
        ``(groups, rows, columns)``, float32.
    """
    view = product.weight
    place = view.shape, view.stride(), view.storage_offset() - whole.storage_offset()

    vector, run = spec.grouping.vector, spec.grouping.run[0]
    apart = vector > 1 and product.rows % run != 0
    fixed = apart and view.numel() < whole.numel()  # it shares with rows that another product reads: its mask stays

    def choose(scores: Tensor) -> Tensor:  # a product may read a part of a weight: groups are those of the whole
        full = whole
        if not fixed:
            full = torch.zeros(whole.shape, dtype=scores.dtype, device=whole.device)
            full.as_strided(*place).copy_(product.tensor(scores))
        return product.matrix(make_mask(full, spec.pattern.n, spec.grouping).as_strided(*place))

    positions, inputs = product.columns
    spans = [
        (position * inputs + start, position * inputs + min(start + spec.grouping.m, inputs))
        for position in range(positions)
        for start in range(0, inputs, spec.grouping.m)
    ]
    selection = Selection(spec.pattern.n, () if apart or spec.grouping.flat else spans, choose, vector, run)
    return CORRECTIONS[method](problem, dense, selection).float()


@torch.no_grad()
def products_of(network: Network, inputs: Sequence[Any], seed: int = 0) -> Iterator[tuple[str, Product, Moments]]:
    """Each weight's first product in a forward pass: its name, the product, and moments of what it reads and gives.

    Moments are centred where outputs may move by a constant. Weights of too many columns, tables that are read by index, and
    products that give zeros are left out.
    """
    job = LayerwiseCorrection(network, network, "", seed, len(inputs), math.inf, silent)
    with running(network.model, inputs, network.wanted) as runs:
        network.look_ahead(inputs[0])
        while True:
            calls = [run.advance() for run in runs]
            stop = calls[0].tag if calls[0] is not None else None
            if stop is None or any(call is None or call.tag.key != stop.key for call in calls):
                return
            if stop.product is None or stop.key in job.seen:
                continue
            job.seen.add(stop.key)
            moments: list[Moments] = []
            for index, call in enumerate(calls):
                assert call is not None  # as was seen
                call.compute()
                job._gather(moments, call, call, None, (index, len(calls)))
            name = str(stop.key[0])
            if moments and name not in network.looked_up:
                both = moments[0] + moments[1]
                both = both.centred() if job._moves(stop) else both
                if both.energy:
                    yield name, stop.product, both


def _match(stop: Stop, inputs: Sequence[tuple[Tensor, Tensor]], shift: Tensor | float = 0.0) -> None:
    """Move a batch norm's statistics as its inputs have moved: means by the difference to dense, variances by the ratio.

    Args:
        shift: by how much the inputs should differ from the dense network's, a number a channel.
    """
    assert stop.mean is not None
    assert stop.variance is not None
    (mean, variance), (dense_mean, dense_variance) = (_moments([pair[which] for pair in inputs]) for which in range(2))
    ratio = variance_ratio(variance, dense_variance, stop.variance)
    stop.mean.add_((mean - dense_mean - shift).to(stop.mean.dtype))
    stop.variance.mul_(ratio.to(stop.variance.dtype))


def _moments(inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance of every channel, float64."""
    count = sum(x.numel() // x.shape[1] for x in inputs)
    others = [dim for dim in range(inputs[0].dim()) if dim != 1]
    mean = torch.stack([x.sum(others, dtype=torch.float64) for x in inputs]).sum(0) / count
    centre = mean.view(-1, *[1] * (inputs[0].dim() - 2)).to(inputs[0].dtype)
    squares = torch.stack([(x - centre).square_().sum(others, dtype=torch.float64) for x in inputs]).sum(0)
    return mean, squares / count
