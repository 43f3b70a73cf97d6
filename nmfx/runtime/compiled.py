"""compile(model, example): the same outputs, each site computed the fastest way this machine knows."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from nmfx.errors import ModelError, NmfxError
from nmfx.graph.modes import keep_modes
from nmfx.passes.baking import bake
from nmfx.runtime.building import load_kernel
from nmfx.runtime.chain import link, repeated
from nmfx.runtime.layers import DEPTHWISE, Fused, dense_layers, sparse_layer
from nmfx.runtime.lowering import export, lower
from nmfx.runtime.operators import slid
from nmfx.runtime.packed import LANES, SPARSE, TILES
from nmfx.runtime.program import window_of
from nmfx.runtime.timing import WHOLE, Advance, Times, ignore, measure, part

REPEATS = 4  # of a sparse way in one chain: without what a call costs from Python, which it does not cost in a network
BEFORE_OTHERS = 1.5  # lanes may take so many times as long as others: between operators by lanes nothing is laid out anew
WHOLE_FROM = 0.4  # density from which the kernel is also tried with all weights, whose rows then share what they read

Sites = list[tuple[fx.Node, Fused]]  # with the nodes of a lowered graph that call them


@dataclass(frozen=True)
class Choice:
    """How a site is computed, and why.

    Attributes:
        name: the weight's.
        shape: of the weight.
        kept: weights that are not zero.
        dense, sparse: seconds of the fastest dense and sparse way for one pass; `sparse` is None where it was not tried.
        plain: the fastest sparse way on plain pictures, for where there are no lanes.
        chosen: ``dense``, ``dense, channels last``, ``dense, depthwise``, or ``sparse CHUNKxVECTORS``; the last two also by
            ``lanes``, and the last ``with zeros`` where the kernel takes all weights.
    """

    name: str
    shape: tuple[int, ...]
    kept: int
    dense: float
    sparse: float | None
    chosen: str
    plain: str | None = None

    @property
    def is_sparse(self) -> bool:
        """Whether the sparse kernel was chosen."""
        return self.chosen.startswith(SPARSE)

    @property
    def seconds(self) -> float:
        """Of what was chosen."""
        return self.sparse if self.sparse is not None and self.is_sparse else self.dense


class CompiledModel(nn.Module):
    """A model in eval mode, lowered: pictures in, the original's outputs out, without gradients.

    Attributes:
        graph: the lowered graph; its ``site0, site1, ...`` are the layers of `nmfx.runtime.layers`, those of the kernel inside
            its ``chain0, chain1, ...`` (`nmfx.runtime.chain`).
        choices: how each site is computed.
        batch: samples of a pass; larger batches go through in several, so that activations stay in the cache.
        kernel: why the kernel is missing; empty when it is there.
    """

    def __init__(self, graph: fx.GraphModule, choices: tuple[Choice, ...], batch: int, free: bool, kernel: str) -> None:
        super().__init__()
        self.graph, self.choices, self.batch, self.free, self.kernel = graph, choices, batch, free, kernel
        self.eval()

    @torch.no_grad()
    def forward(self, x: Tensor) -> Any:
        """As the original's; any batch size where torch.export could keep it free.

        Raises:
            NmfxError: another batch size than that of a model whose batch size is fixed.
        """
        if len(x) <= self.batch and (self.free or len(x) == self.batch):
            return self.graph(x)
        if not self.free and len(x) % self.batch:
            raise NmfxError(f"compiled for batches of {self.batch}, got one of {len(x)}: torch.export fixed the batch size")
        parts = [self.graph(part) for part in x.split(self.batch)]
        return _joined(parts)

    def train(self, mode: bool = True) -> CompiledModel:
        """It stays in eval mode."""
        return super().train(False)


def _joined(parts: list[Any]) -> Any:
    """Outputs of several passes as those of one: tensors joined along the batch, whatever holds them."""
    return tree_map(lambda *each: torch.cat(each) if isinstance(each[0], Tensor) else each[0], parts[0], *parts[1:])


def compile(model: nn.Module, example_input: Tensor, *, batch: int | None = None, progress: Advance = ignore) -> CompiledModel:
    """Lower a converted, baked or plain model for this machine.

    Every convolution and linear layer is fused with its batch norm, residual and clamp, and computed by PyTorch's dense
    operator or by the sparse kernel, whichever is faster here for this shape; what was measured is kept on disk.

    Args:
        example_input: a batch of the size and shape to be fast for.
        batch: samples of a pass; None measures 1, 2, 4, ... up to the example's, and one at a time on each thread.
        progress: called with the share done and the site.

    Raises:
        ModelError: torch.export cannot follow the model.
    """
    if not isinstance(example_input, Tensor) or not len(example_input):
        raise ModelError(f"compile: expected a batch of pictures as a tensor, got {type(example_input).__name__}")
    example = example_input.detach().cpu()
    plain = bake(model).cpu()
    kernel = load_kernel()
    with keep_modes(plain):
        graph, free = export(plain.eval(), example)
    sites = lower(graph)
    found = list[CompiledModel]()
    passes = _passes(len(example), batch, free, alone=not kernel)
    for number, (size, alone) in enumerate(passes):
        with _one_thread() if alone else contextlib.nullcontext():
            times = Times()
            timed = time_sites(copy_of(graph), sites, example[:size], times, part(progress, number, len(passes)))
            times.save()
            for mine, choices in with_and_without_lanes(graph, timed, images=size if alone else 0):
                found.append(CompiledModel(mine, choices, len(example) if alone else size, free, kernel))
    return fastest(found, example)


def _passes(count: int, batch: int | None, free: bool, *, alone: bool) -> list[tuple[int, bool]]:
    """Ways to cut a batch: samples of a pass, and whether each pass stays on one thread."""
    threads = torch.get_num_threads()
    if batch is not None or not free:
        return [(batch if batch and free else count, False)]
    sizes = [2**i for i in range(count.bit_length()) if 2**i <= count]
    ways = [(size, False) for size in sizes]
    return [*ways, (1, True)] if alone and 1 < threads <= count else ways


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def copy_of(graph: fx.GraphModule) -> fx.GraphModule:
    """The same graph over the same tensors, with sites of its own."""
    return fx.GraphModule(graph, copy.deepcopy(graph.graph))


@dataclass(frozen=True)
class TimedSite:
    """A site, and the seconds of every way to compute it, for one pass."""

    node: fx.Node
    fused: Fused
    took: Mapping[str, float]

    def choice(self, *, sparse: bool = True, lanes: bool = True) -> Choice:
        """The fastest of the dense ways, and of the sparse ones and those by lanes, lanes even where a little slower."""
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
    graph: fx.GraphModule, sites: Sites, example: Tensor, times: Times, progress: Advance = ignore
) -> list[TimedSite]:
    """Time every way to compute each site of a lowered graph on what an example gives it; dense layers are put in."""
    seen, timed = inputs_of(graph, sites, example), []
    for index, (node, fused) in enumerate(sites):
        progress(index / len(sites), fused.name)
        timed.append(time_site(node, fused, seen[str(node.target)], times))
    return timed


def with_and_without_lanes(
    graph: fx.GraphModule, timed: Sequence[TimedSite], *, images: int = 0
) -> Iterator[tuple[fx.GraphModule, tuple[Choice, ...]]]:
    """A lowered graph with the fastest layers and its chains: a copy without lanes, and one with them if a site has any."""
    for lanes in (False, True):
        choices = tuple(one.choice(lanes=lanes) for one in timed)
        if not lanes or any(LANES in choice.chosen for choice in choices):
            mine = copy_of(graph)
            put(mine, timed, choices)
            if not load_kernel():
                link(mine, images)
            yield mine, choices


def fastest(models: Sequence[CompiledModel], example: Tensor) -> CompiledModel:
    """Of several ways to compile one model, measured on an example."""
    if len(models) == 1:
        return models[0]
    took = measure({str(index): partial(one, example) for index, one in enumerate(models)}, least=WHOLE)
    return models[min(range(len(models)), key=lambda index: took[str(index)])]


def put(graph: fx.GraphModule, timed: Iterable[TimedSite], choices: Iterable[Choice]) -> None:
    """Put the chosen layer into every site of a lowered graph."""
    for one, choice in zip(timed, choices, strict=True):
        graph.add_submodule(str(one.node.target), layer_for(one.fused, choice.chosen, choice.plain))
    graph.recompile()


def inputs_of(graph: fx.GraphModule, sites: Sites, example: Tensor) -> dict[str, tuple[Tensor, ...]]:
    """What every site of a lowered graph is given for an example, by the name of its module; dense layers are put in."""
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
    whole = fused.is_conv and kept >= WHOLE_FROM * fused.weight.numel()
    fitting = [tile for tile in TILES if tile.chunk < 2 * fused.weight[0].numel() or tile.chunk <= 128]
    tiles = [tile for tile in fitting if tile.lanes <= lanes and tile.whole <= whole and kernel and not fused.depthwise]
    names = [*dense_layers(fused, lanes=lanes), *map(str, tiles)]
    chained = {name for name in names if kernel and (DEPTHWISE in name or name.startswith(SPARSE))}
    geometry = (fused.geometry, fused.groups, fused.residual, fused.low, fused.high, fused.bias is not None)
    seen = [(tuple(one.shape), one.stride()) for one in inputs]
    what = ("site", tuple(fused.weight.shape), kept, geometry, seen, names, REPEATS)

    def candidates() -> dict[str, Callable[[], Any]]:
        layers = {name: layer_for(fused, name) for name in names}
        chains = {name: repeated(layers[name], inputs, REPEATS) for name in names if name in chained}
        return {name: partial(layer, *inputs) for name, layer in layers.items()} | chains

    took = times.get(what, names, candidates)
    return TimedSite(node, fused, {name: seconds / (REPEATS if name in chained else 1) for name, seconds in took.items()})


def _has_lanes(fused: Fused, inputs: tuple[Tensor, ...]) -> bool:
    """Whether a site could be computed on pictures as lanes."""
    if not fused.is_conv or inputs[0].dim() != 4:
        return False
    kernel = tuple(fused.weight.shape[2:])
    out = slid(inputs[0], kernel, *fused.geometry)
    return window_of(inputs[0].shape[2:], out, kernel, *fused.geometry) is not None


def layer_for(fused: Fused, chosen: str, plain: str | None = None) -> nn.Module:
    """The layer of a choice."""
    if chosen.startswith(SPARSE):
        tiles = {str(tile): tile for tile in TILES}
        return sparse_layer(fused, tiles[chosen], tiles.get(plain or ""))
    return dense_layers(fused, lanes=True)[chosen]
