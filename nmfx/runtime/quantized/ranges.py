"""What values go through a lowered graph for some pictures, and the bytes that stand for them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

SAMPLES = 1 << 15  # values of a node that its range is chosen by
SHRINKS = [1.0 - step / 64 for step in range(48)]  # of the range of all values: those tried
PERCENTILE = 0.9999
SMALLEST = 1e-30  # range that bytes are spread over: steps have an inverse in float32


@dataclass(frozen=True)
class Step:
    """How bytes stand for numbers: q for ``(q - zero) * scale``."""

    scale: float
    zero: int

    @staticmethod
    def between(low: float, high: float) -> Step:
        """For numbers from `low` to `high`, zero among them."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = (high - low) / 255 if high - low > SMALLEST else 1.0
        return Step(scale, min(255, max(0, round(-low / scale))))

    def byte(self, value: float) -> int:
        """The byte nearest to a number."""
        return (
            0 if value == -math.inf else 255 if value == math.inf else min(255, max(0, round(value / self.scale) + self.zero))
        )


@dataclass
class Values:
    """Values of a node: the least and the largest, and a sample of at most `SAMPLES` from every batch."""

    low: float = math.inf
    high: float = -math.inf
    samples: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor) -> None:
        """Take in a batch."""
        flat = x.detach().flatten()
        if flat.numel():
            self.low, self.high = min(self.low, float(flat.min())), max(self.high, float(flat.max()))
            self.samples.append(flat[:: max(1, flat.numel() // SAMPLES)].clone())

    def step(self, method: str = "mse") -> Step:
        """The bytes for these values.

        Args:
            method: ``mse`` takes the share of the whole range for which the squared error of the sample is least,
                ``percentile`` leaves out one in ten thousand on each side, ``minmax`` nothing.
        """
        if not self.samples or not math.isfinite(self.low + self.high):
            return Step(1.0, 0)
        if method == "minmax":
            return Step.between(self.low, self.high)
        x = torch.cat(self.samples)
        x = x[:: max(1, x.numel() // SAMPLES)]
        if method == "percentile":
            return Step.between(float(x.quantile(1 - PERCENTILE)), float(x.quantile(PERCENTILE)))
        steps = [Step.between(self.low * share, self.high * share) for share in SHRINKS]
        return min(steps, key=lambda step: float((_rounded(x, step) - x).square().sum()))


def _rounded(x: Tensor, step: Step) -> Tensor:
    return ((x / step.scale + step.zero).round_().clamp_(0, 255) - step.zero) * step.scale


class _Watch(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule, nodes: Iterable[fx.Node]) -> None:
        super().__init__(graph)
        self.seen = {node: Values() for node in nodes}

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        if node in self.seen:
            self.seen[node].add(value)
        return value


@torch.no_grad()
def observe(graph: fx.GraphModule, nodes: Iterable[fx.Node], batches: Sequence[Tensor]) -> dict[fx.Node, Values]:
    """The values of some nodes of a graph for all batches, each of a size that the graph is for."""
    watch = _Watch(graph, nodes)
    for batch in batches:
        watch.run(batch)
    return watch.seen
