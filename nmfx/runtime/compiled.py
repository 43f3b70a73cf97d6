"""compile(model, example): the same outputs, each site computed the fastest way this machine knows."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
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
from nmfx.runtime.layers import Fused, dense_layers, sparse_layer
from nmfx.runtime.lowering import export, lower
from nmfx.runtime.packed import TILES
from nmfx.runtime.timing import WHOLE, Advance, Times, ignore, measure, part

SPARSE = "sparse"
REPEATS = 4  # of a sparse way in one chain: without what a call costs from Python, which it does not cost in a network
SPARSE_BELOW = 1.0  # density up to which the kernel is tried: it can win with all weights too, as in the stem of a ResNet


@dataclass(frozen=True)
class Choice:
    """How a site is computed, and why.

    Attributes:
        name: the weight's.
        shape: of the weight.
        kept: weights that are not zero.
        dense, sparse: seconds of the fastest dense and sparse way for one pass; `sparse` is None where it was not tried.
        chosen: ``dense``, ``dense, channels last``, ``dense, depthwise``, or ``sparse CHUNKxVECTORS``.
    """

    name: str
    shape: tuple[int, ...]
    kept: int
    dense: float
    sparse: float | None
    chosen: str

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
        report = part(progress, number, len(passes))
        mine = graph if number + 1 == len(passes) else copy_of(graph)
        with _one_thread() if alone else contextlib.nullcontext():
            times = Times()
            choices = choose(mine, sites, example[:size], times, sparse=not kernel, progress=report)
            times.save()
        if not kernel:
            link(mine, size if alone else 0)
        found.append(CompiledModel(mine, choices, len(example) if alone else size, free, kernel))
    if len(found) == 1:
        return found[0]
    took = measure({str(index): partial(one, example) for index, one in enumerate(found)}, least=WHOLE)
    return found[min(range(len(found)), key=lambda index: took[str(index)])]


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


def choose(
    graph: fx.GraphModule,
    sites: list[tuple[fx.Node, Fused]],
    example: Tensor,
    times: Times,
    *,
    sparse: bool = True,
    progress: Advance = ignore,
) -> tuple[Choice, ...]:
    """Put a layer into every site of a lowered graph: the fastest for the example."""
    seen, choices = inputs_of(graph, sites, example), []
    for index, (node, fused) in enumerate(sites):
        progress(index / len(sites), fused.name)
        choice = time_site(fused, seen[str(node.target)], times, sparse=sparse)
        graph.add_submodule(str(node.target), layer_for(fused, choice.chosen))
        choices.append(choice)
    graph.recompile()
    return tuple(choices)


def inputs_of(graph: fx.GraphModule, sites: list[tuple[fx.Node, Fused]], example: Tensor) -> dict[str, tuple[Tensor, ...]]:
    """What every site of a lowered graph is given for an example, by the name of its module; dense layers are put in."""
    seen: dict[str, tuple[Tensor, ...]] = {}
    for node, fused in sites:
        graph.add_submodule(str(node.target), dense := next(iter(dense_layers(fused).values())))
        dense.register_forward_pre_hook(lambda module, args, name=str(node.target): seen.update({name: args}))
    with torch.no_grad():
        graph(example)
    return seen


@torch.no_grad()
def time_site(fused: Fused, inputs: tuple[Tensor, ...], times: Times, *, sparse: bool = True) -> Choice:
    """Time the ways to compute a site on these inputs, and choose."""
    kept, dense = fused.kept, dense_layers(fused)
    tiles = [tile for tile in TILES if tile[0] < 2 * fused.weight[0].numel() or tile == TILES[0]]
    if not sparse or fused.depthwise or kept > SPARSE_BELOW * fused.weight.numel():
        tiles = []
    ways = {f"{SPARSE} {chunk}x{vectors}": (chunk, vectors) for chunk, vectors in tiles}
    geometry = (fused.geometry, fused.groups, fused.residual, fused.low, fused.high, fused.bias is not None)
    seen = [(tuple(one.shape), one.stride()) for one in inputs]
    what = ("site", tuple(fused.weight.shape), kept, geometry, seen, [*dense, *ways], REPEATS)

    def candidates() -> dict[str, Callable[[], Tensor]]:
        chains = {name: repeated(sparse_layer(fused, *tile), len(inputs), REPEATS) for name, tile in ways.items()}
        return {name: partial(layer, *inputs) for name, layer in (dense | chains).items()}

    took = {name: seconds / (REPEATS if name in ways else 1) for name, seconds in times.get(what, candidates).items()}
    return Choice(
        name=fused.name,
        shape=tuple(fused.weight.shape),
        kept=kept,
        dense=min(took[name] for name in dense),
        sparse=min((took[name] for name in ways), default=None),
        chosen=min(took, key=lambda name: took[name]),
    )


def layer_for(fused: Fused, chosen: str) -> nn.Module:
    """The layer of a choice."""
    dense = dense_layers(fused)
    if chosen in dense:
        return dense[chosen]
    chunk, vectors = map(int, chosen.removeprefix(SPARSE).split("x"))
    return sparse_layer(fused, chunk, vectors)
