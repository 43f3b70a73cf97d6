"""Which way each site of a lowered graph is computed: all are timed on this machine, and the fastest is chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from nmfx.progress import Progress, silent
from nmfx.runtime.calls import window_of
from nmfx.runtime.chain import repeated
from nmfx.runtime.checks import output_size
from nmfx.runtime.kernel.library import load_kernel
from nmfx.runtime.layers import DEPTHWISE, Fused, dense_layers, layer_for
from nmfx.runtime.layout.tiles import FEW, LANES, SPARSE, TILES
from nmfx.runtime.lowering.fusion import Sites
from nmfx.runtime.measuring.timing import Times

REPEATS = 4  # calls of a sparse way in one timed chain: in a network, too, one call from Python runs many operators
BEFORE_OTHERS = 1.5  # lanes may take this many times as long: between operators by lanes nothing is laid out anew
MUCH = 1e8  # multiply-adds of a way that is timed by single calls when few are tried: some 2 ms
ZEROS_FROM = 0.4  # density from which the kernel is also tried with zeros stored: rows then share what they read


@dataclass(frozen=True)
class Choice:
    """How a site is computed, and why.

    Attributes:
        name: the weight's.
        shape: of the weight.
        kept: weights that are not zero.
        dense, sparse: seconds of the fastest dense and sparse way for one pass; None where it was not tried.
        plain: the fastest sparse way on plain pictures, for where there are no lanes.
        chosen: ``dense``, ``dense, channels last``, ``dense, depthwise``, or ``sparse CHUNKxVECTORS``; the last two also by
            ``lanes``, and the last ``with zeros`` where the kernel takes all weights; or ``int8``.
        reason: why an int8 model computes it in float32; empty where it does not.
    """

    name: str
    shape: tuple[int, ...]
    kept: int
    dense: float | None
    sparse: float | None
    chosen: str
    plain: str | None = None
    reason: str = ""

    @property
    def is_sparse(self) -> bool:
        """Whether the sparse kernel was chosen."""
        return self.chosen.startswith(SPARSE)

    @property
    def seconds(self) -> float:
        """Seconds of one pass by the way that was chosen; 0 where it was not timed."""
        return (self.sparse if self.sparse is not None and self.is_sparse else self.dense) or 0.0


@dataclass(frozen=True)
class TimedSite:
    """A site of a lowered graph, and by name of each way to compute it, the seconds of one pass."""

    node: fx.Node
    fused: Fused
    took: Mapping[str, float]

    def choice(self, *, sparse: bool = True, lanes: bool = True) -> Choice:
        """The fastest way; one by lanes even where it is slower by less than `BEFORE_OTHERS`.

        Args:
            sparse: allow sparse ways, and dense ones by lanes.
            lanes: allow ways by lanes.
        """
        dense = {name: took for name, took in self.took.items() if not name.startswith(SPARSE)}
        products = {name: took for name, took in self.took.items() if name.startswith(SPARSE) and sparse}
        plain = [name for name in products if LANES not in name]
        allowed = {name: took for name, took in (dense | products).items() if (lanes and sparse) or LANES not in name}
        return Choice(
            name=self.fused.name,
            shape=tuple(self.fused.weight.shape),
            kept=self.fused.kept,
            dense=min(dense[name] for name in dense if name in allowed),
            sparse=min((products[name] for name in products if name in allowed), default=None),
            chosen=min(allowed, key=lambda name: allowed[name] / (BEFORE_OTHERS if LANES in name else 1.0)),
            plain=min(plain, key=lambda name: products[name], default=None),
        )


def time_sites(
    graph: fx.GraphModule, sites: Sites, example: Tensor, times: Times, progress: Progress = silent
) -> list[TimedSite]:
    """Time every way to compute each site of a lowered graph; its sites are dense layers afterwards.

    Args:
        graph: changed in place.
        sites: of the graph, as `lower` gave them.
        example: the input of the graph, whose inner results the sites are timed on.
        times: what was measured before, and takes what is measured now; a quick one tries few ways.
        progress: called with the share done and which site is timed.

    Returns:
        The sites in the same order, with their times.
    """
    seen, timed = inputs_of(graph, sites, example), []
    for index, (node, fused) in enumerate(sites):
        progress(index / len(sites), f"timing {fused.name}")
        timed.append(time_site(node, fused, seen[str(node.target)], times))
    return timed


def install_layers(graph: fx.GraphModule, timed: Iterable[TimedSite], choices: Iterable[Choice]) -> None:
    """Give every site of a lowered graph the layer of its choice, in place."""
    for one, choice in zip(timed, choices, strict=True):
        graph.add_submodule(str(one.node.target), layer_for(one.fused, choice.chosen, choice.plain))
    graph.recompile()


def inputs_of(graph: fx.GraphModule, sites: Sites, example: Tensor) -> dict[str, tuple[Tensor, ...]]:
    """The inputs of every site for an example, by the name of its module; the sites are dense layers afterwards."""
    seen: dict[str, tuple[Tensor, ...]] = {}
    for node, fused in sites:
        graph.add_submodule(str(node.target), dense := next(iter(dense_layers(fused).values())))
        dense.register_forward_pre_hook(lambda module, args, name=str(node.target): seen.update({name: args}))
    with torch.no_grad():
        graph(example)
    return seen


@torch.no_grad()
def time_site(node: fx.Node, fused: Fused, inputs: tuple[Tensor, ...], times: Times) -> TimedSite:
    """Time all ways that this machine has to compute a site on these inputs."""
    kept, kernel = fused.kept, not load_kernel()
    lanes = kernel and _has_lanes(fused, inputs)
    zeros = fused.is_conv and kept >= ZEROS_FROM * fused.weight.numel()
    fitting = [tile for tile in TILES if tile.chunk < 2 * fused.weight[0].numel() or tile.chunk <= 128]
    tiles = [tile for tile in fitting if tile.lanes <= lanes and tile.zeros <= zeros and kernel and not fused.depthwise]
    repeats = REPEATS
    if times.quick:
        tiles = [tile for tile in tiles if tile in FEW[lanes]] or tiles[:1]
        channels = inputs[0].shape[1 if fused.is_conv else -1]
        repeats = 1 if kept * inputs[0].numel() / channels > MUCH else REPEATS
    names = [*dense_layers(fused, lanes=lanes), *map(str, tiles)]
    chained = {name for name in names if kernel and (DEPTHWISE in name or name.startswith(SPARSE))}
    geometry = (fused.geometry, fused.groups, fused.residual, fused.low, fused.high, fused.bias is not None)
    seen = [(tuple(one.shape), one.stride()) for one in inputs]
    what = ("site", tuple(fused.weight.shape), kept, geometry, seen, names, repeats)

    def candidates() -> dict[str, Callable[[], Any]]:
        layers = {name: layer_for(fused, name) for name in names}
        chains = {name: repeated(layers[name], inputs, repeats) for name in names if name in chained}
        return {name: partial(layer, *inputs) for name, layer in layers.items()} | chains

    took = times.get(what, names, candidates)
    return TimedSite(node, fused, {name: seconds / (repeats if name in chained else 1) for name, seconds in took.items()})


def _has_lanes(fused: Fused, inputs: tuple[Tensor, ...]) -> bool:
    """Whether a site can be computed on pictures that are laid out as lanes."""
    if not fused.is_conv or inputs[0].dim() != 4:
        return False
    kernel = tuple(fused.weight.shape[2:])
    out = output_size(inputs[0], kernel, *fused.geometry)
    return window_of(inputs[0].shape[2:], out, kernel, *fused.geometry) is not None
