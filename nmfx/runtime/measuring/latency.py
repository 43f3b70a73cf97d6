"""What every pattern of every site takes on this machine: the prices of a search under a latency budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from nmfx.errors import ModelError
from nmfx.passes.baking import bake
from nmfx.progress import Progress, silent
from nmfx.runtime.compiled import Lowered
from nmfx.runtime.compiler import compile, fastest, with_and_without_lanes
from nmfx.runtime.kernel.library import load_kernel, quiet
from nmfx.runtime.layers import Fused
from nmfx.runtime.lowering.exporting import copy_of, export
from nmfx.runtime.lowering.fusion import lower
from nmfx.runtime.measuring.choices import TimedSite, inputs_of, install_layers, time_site
from nmfx.runtime.measuring.timing import NETWORK_SECONDS, Times, measure
from nmfx.runtime.quantized.compiling import in_bytes
from nmfx.runtime.quantized.timing import int8_seconds
from nmfx.sparsity.layout import Grouping
from nmfx.sparsity.mask import make_mask
from nmfx.sparsity.pattern import Pattern

NANO = 1_000_000_000
COMPILED = "torch.compile, frozen"


@dataclass(frozen=True)
class Latency:
    """Measured times of one pass over a batch.

    Attributes:
        prices: nanoseconds of a site under each of its patterns, dense among them; none above dense, since the runtime takes
            the dense operator where that is faster, and of one M and V never rising as N falls. Those of different M or V are
            laid out and computed differently: nothing follows from one for another.
        rest: nanoseconds of all that is between the sites, in a sparse network; below zero where calls measured one by one
            take longer than in a chain.
        baseline: nanoseconds of the best dense run: of `dense_runs`, and lowered by nmfx.
        run: that run, to measure others beside it.
    """

    prices: Mapping[str, Mapping[Pattern, int]] = field(repr=False)
    rest: int
    baseline: int
    run: Callable[[], object] | None = field(default=None, repr=False, compare=False)

    @property
    def dense(self) -> int:
        """Nanoseconds of all sites when all are dense."""
        return sum(price[Pattern.DENSE] for price in self.prices.values())

    def predict(self, patterns: Mapping[str, Pattern]) -> float:
        """Seconds of a pass over the batch under a scheme; sites without a pattern are dense."""
        sites = sum(price[patterns.get(name, Pattern.DENSE)] for name, price in self.prices.items())
        return (sites + self.rest) / NANO

    def adjusted(self, measured: float, patterns: Mapping[str, Pattern]) -> Latency:
        """The same prices with another `rest`, so that `predict` gives the `measured` seconds for these patterns."""
        return replace(self, rest=self.rest + round((measured - self.predict(patterns)) * NANO))


def dense_runs(model: nn.Module, example: Tensor) -> dict[str, Callable[[], object]]:
    """The ways of PyTorch to run a dense model on an example: eager, channels last, and compiled with frozen weights."""
    plain = bake(model).eval()
    runs: dict[str, Callable[[], object]] = {"PyTorch": partial(plain, example)}
    if example.dim() == 4:
        last = bake(model).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        runs["PyTorch, channels last"] = partial(last, example.contiguous(memory_format=torch.channels_last))
    frozen = compile_frozen(model, example)
    if frozen is not None:
        runs[COMPILED] = partial(frozen, example)
    return runs


def compile_frozen(model: nn.Module, example: Tensor) -> Callable[[Tensor], object] | None:
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
    precision: str = "float32",
    rivals: Mapping[str, Callable[[], object]] | None = None,
    progress: Progress = silent,
) -> Latency:
    """Time every pattern of every site that the runtime can lower, and the rest of the network.

    Args:
        groupings: the patterns to time, by site, with how each divides the weight.
        example: a batch of the size to be fast for.
        precision: ``int8``: sites that can be are timed in int8, and what is dense is dense int8.
        rivals: other dense runs of the model, by name, for the same batch.

    Raises:
        ModelError: torch.export cannot follow the model; int8 without the kernel.
    """
    if (reason := load_kernel()) and precision == "int8":
        raise ModelError(f"int8 needs the kernel: {reason}")
    seconds = partial(_seconds, in_int8=precision == "int8")
    times = Times()
    graph, domain = export(bake(model).eval(), example)
    sites = lower(graph)
    seen = inputs_of(graph, sites, example)
    prices: dict[str, dict[Pattern, int]] = {}
    as_they_are, sparsest = list[_Timed](), list[_Timed]()  # the time between sites is measured in networks of these
    for index, (node, fused) in enumerate(sites):
        progress(index / len(sites), f"timing {fused.name}")
        inputs, offered = seen[str(node.target)], groupings.get(fused.name, {})
        timed = {Pattern.DENSE: seconds(node, fused, inputs, times)}
        found = {Pattern.DENSE: round(timed[Pattern.DENSE].seconds * NANO)}
        least: dict[tuple[int, int], int] = {}  # of one M and V
        patterns = [pattern for pattern in offered if not pattern.is_dense]
        for pattern in sorted(patterns, key=lambda one: one.density, reverse=True):
            pruned = replace(fused, weight=fused.weight * make_mask(fused.weight, pattern.n, offered[pattern]))
            timed[pattern] = seconds(node, pruned, inputs, times)
            group, dense_price = (pattern.m, pattern.vector), found[Pattern.DENSE]
            least[group] = min(least.get(group, dense_price), round(timed[pattern].seconds * NANO))
            found[pattern] = least[group]
        twice = prices.get(fused.name, {})  # a weight read at two places is paid for twice
        prices[fused.name] = {pattern: price + twice.get(pattern, 0) for pattern, price in found.items()}
        as_they_are.append(timed[Pattern.DENSE])
        sparsest.append(timed[min(patterns, key=lambda one: (one.density, -one.vector), default=Pattern.DENSE)])
    times.save()
    runs = dict(rivals or {})
    if precision == "int8":
        (dense,) = in_bytes(graph, domain, sites, example, noise(example), passes=(0,))
        graph, domain = export(bake(model).eval(), example)
        again = zip(lower(graph), sparsest, strict=True)
        pruned_sites = [(node, timed.site.fused) for (node, _), timed in again]
        (sparse,) = in_bytes(graph, domain, pruned_sites, example, noise(example), passes=(0,))
    else:
        plain = [one.site for one in as_they_are]
        other = copy_of(graph)
        install_layers(other, plain, [one.choice(sparse=False) for one in plain])
        dense = Lowered(other, domain, (), len(example))
        built = with_and_without_lanes(graph, [one.site for one in sparsest])
        sparse = fastest([Lowered(mine, domain, choices, len(example)) for mine, choices in built], example)
        runs |= dense_runs(model, example)
    runs |= {"dense": lambda: dense(example), "sparse": lambda: sparse(example)}
    with torch.no_grad():
        took = measure(runs, seconds=NETWORK_SECONDS)
    rest = round((took.pop("sparse") - sum(one.seconds for one in sparsest)) * NANO)
    best = min(took, key=lambda name: took[name])
    return Latency(prices, rest, round(took[best] * NANO), runs[best])


@dataclass(frozen=True)
class _Timed:
    """A site under a pattern: its ways in float32, those that were timed, and the seconds of the one it is computed in."""

    site: TimedSite
    seconds: float


def _seconds(node: fx.Node, fused: Fused, inputs: tuple[Tensor, ...], times: Times, *, in_int8: bool) -> _Timed:
    seconds = int8_seconds(node, fused, inputs, times) if in_int8 else None
    if seconds is not None:
        return _Timed(TimedSite(node, fused, {}), seconds)
    site = time_site(node, fused, inputs, times)
    return _Timed(site, site.choice(lanes=not in_int8).seconds)


def noise(example: Tensor) -> list[Tensor]:
    """A batch to choose ranges by where only times count, which do not hang on them."""
    return [torch.randn(example.shape, generator=torch.Generator().manual_seed(0))]


@torch.no_grad()
def measured_seconds(model: nn.Module, example: Tensor, beside: Latency | None = None, precision: str = "float32") -> float:
    """Seconds of a pass of a converted model, compiled for this batch.

    Args:
        beside: measure the dense run as well, in turns, and say how long the model would have taken when that one took its
            `baseline`: a machine that others use is not always as fast.
        precision: as `nmfx.compile` has it.
    """
    how: dict[str, Any] = {"batch": len(example), "tune": "full"}
    if precision == "int8":
        how = {"precision": precision, "calibration": noise(example)}
    compiled = compile(model, example, **how)
    runs: dict[str, Callable[[], object]] = {"compiled": lambda: compiled(example)}
    if beside is None or beside.run is None:
        return measure(runs, seconds=NETWORK_SECONDS)["compiled"]
    took = measure(runs | {"dense": beside.run}, seconds=NETWORK_SECONDS)
    return took["compiled"] / took["dense"] * beside.baseline / NANO
