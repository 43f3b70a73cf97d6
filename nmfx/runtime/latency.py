"""What every pattern of every site takes on this machine: the prices of a search under a latency budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from nmfx.passes.baking import bake
from nmfx.runtime.building import load_kernel, quiet
from nmfx.runtime.compiled import CompiledModel, choose, compile, inputs_of, time_site
from nmfx.runtime.layers import Fused
from nmfx.runtime.lowering import export, lower
from nmfx.runtime.timing import Advance, Times, ignore, measure
from nmfx.sparsity.layout import Grouping
from nmfx.sparsity.mask import make_mask
from nmfx.sparsity.pattern import Pattern

NANO = 1_000_000_000
COMPILED = "torch.compile, frozen"


@dataclass(frozen=True)
class Latency:
    """Measured times of one pass over a batch.

    Attributes:
        prices: nanoseconds of a site under each of its patterns, dense among them; never rising as weights are dropped, since
            the runtime takes the dense operator where that is faster.
        rest: nanoseconds of all that is between the sites.
        baseline: nanoseconds of the best dense run: of `dense_runs`, and lowered by nmfx.
    """

    prices: Mapping[str, Mapping[Pattern, int]] = field(repr=False)
    rest: int
    baseline: int

    @property
    def dense(self) -> int:
        """Nanoseconds of all sites, dense."""
        return sum(price[Pattern.DENSE] for price in self.prices.values())

    def predict(self, patterns: Mapping[str, Pattern]) -> float:
        """Seconds of a pass under a scheme."""
        sites = sum(price[patterns.get(name, Pattern.DENSE)] for name, price in self.prices.items())
        return (sites + self.rest) / NANO

    def adjusted(self, measured: float, patterns: Mapping[str, Pattern]) -> Latency:
        """The same, with the time between the sites as a measured run of a scheme says it is."""
        return replace(self, rest=self.rest + round((measured - self.predict(patterns)) * NANO))


def dense_runs(model: nn.Module, example: Tensor) -> dict[str, Callable[[], object]]:
    """The ways of PyTorch to run a dense model on an example: eager, channels last, and compiled with frozen weights."""
    plain = bake(model).eval()
    runs: dict[str, Callable[[], object]] = {"PyTorch": partial(plain, example)}
    if example.dim() == 4:
        last = bake(model).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        runs["PyTorch, channels last"] = partial(last, example.contiguous(memory_format=torch.channels_last))
    frozen = freeze(model, example)
    if frozen is not None:
        runs[COMPILED] = partial(frozen, example)
    return runs


def freeze(model: nn.Module, example: Tensor) -> Callable[[Tensor], object] | None:
    """A model compiled by torch.compile with its weights frozen, for this shape; None where the compiler cannot."""
    from torch._inductor import config

    plain = bake(model).eval()
    try:
        with config.patch(freezing=True), torch.no_grad(), quiet("torch.utils.cpp_extension"):
            torch._dynamo.reset()
            compiled = torch.compile(plain)
            compiled(example)
    except Exception:  # whatever the compiler raises: a baseline less
        return None
    return compiled  # type: ignore[no-any-return]


def measure_latency(
    model: nn.Module,
    groupings: Mapping[str, Mapping[Pattern, Grouping]],
    example: Tensor,
    *,
    progress: Advance = ignore,
) -> Latency:
    """Time every pattern of every site that the runtime can lower, and the rest of the network.

    Args:
        groupings: the patterns to time, by site, with how each divides the weight.
        example: a batch of the size to be fast for.

    Raises:
        ModelError: torch.export cannot follow the model.
    """
    kernel, times = load_kernel(), Times()
    graph, free = export(bake(model).eval(), example)
    sites = lower(graph)
    seen = inputs_of(graph, sites, example)
    prices: dict[str, dict[Pattern, int]] = {}
    for index, (node, fused) in enumerate(sites):
        progress(index / len(sites), fused.name)
        inputs, offered = seen[str(node.target)], groupings.get(fused.name, {})
        least = round(time_site(fused, inputs, times, sparse=False).dense * NANO)
        found = {Pattern.DENSE: least}
        for pattern in sorted((p for p in offered if not p.is_dense), key=lambda p: p.density, reverse=True):
            least = min(least, _price(fused, pattern, offered[pattern], inputs, times, sparse=not kernel))
            found[pattern] = least
        twice = prices.get(fused.name, {})  # a weight read at two places is paid for twice
        prices[fused.name] = {pattern: price + twice.get(pattern, 0) for pattern, price in found.items()}
    choices = choose(graph, sites, example, times, sparse=False)
    times.save()
    dense = CompiledModel(graph, choices, len(example), free, kernel)
    whole = measure({"dense": lambda: dense(example)})["dense"]
    rest = max(0, round((whole - sum(choice.seconds for choice in choices)) * NANO))
    with torch.no_grad():
        best = min(whole, *measure(dense_runs(model, example), rounds=11).values())
    return Latency(prices, rest, round(best * NANO))


def _price(
    fused: Fused, pattern: Pattern, grouping: Grouping, inputs: tuple[Tensor, ...], times: Times, *, sparse: bool
) -> int:
    mask = make_mask(fused.weight, pattern.n, grouping)
    choice = time_site(replace(fused, weight=fused.weight * mask), inputs, times, sparse=sparse)
    return round(choice.seconds * NANO)


def measured_seconds(model: nn.Module, example: Tensor) -> float:
    """Seconds of a pass of a converted model, compiled for this batch."""
    compiled = compile(model, example, batch=len(example))
    return measure({"compiled": lambda: compiled(example)}, rounds=15)["compiled"]
