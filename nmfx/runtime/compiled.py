"""compile(model, example): the same outputs, each site computed the fastest way this machine knows."""

from __future__ import annotations

import contextlib
import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from nmfx.errors import ModelError, NmfxError
from nmfx.masking.modes import keep_modes
from nmfx.passes.baking import bake
from nmfx.progress import Progress, silent
from nmfx.runtime.building import load_kernel
from nmfx.runtime.chain import link, repeated
from nmfx.runtime.checks import output_size
from nmfx.runtime.layers import DEPTHWISE, LAYERS, Fused, alike, dense_layers, sparse_layer
from nmfx.runtime.lowering import EXPORTING, Domain, export, lower
from nmfx.runtime.packed import LANES, SPARSE, TILES
from nmfx.runtime.program import window_of
from nmfx.runtime.timing import NETWORK_SECONDS, Times, measure, portion

REPEATS = 4  # calls of a sparse way in one timed chain: in a network, too, one call from Python runs many operators
BEFORE_OTHERS = 1.5  # lanes may take this many times as long: between operators by lanes nothing is laid out anew
ZEROS_FROM = 0.4  # density from which the kernel is also tried with zeros stored: rows then share what they read
SHAPES = 8  # lowerings for other sizes that are kept

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
        """Seconds of one pass by the way that was chosen."""
        return self.sparse if self.sparse is not None and self.is_sparse else self.dense


@dataclass(frozen=True, eq=False)
class Lowered:
    """A model lowered for one shape.

    Attributes:
        graph: its ``site0, site1, ...`` are the layers of `nmfx.runtime.layers`, those of the kernel inside its ``chain0,
            chain1, ...`` (`nmfx.runtime.chain`).
        domain: the inputs that the graph is for.
        choices: how each site is computed.
        batch: samples of a pass.
        images: samples that stay on one thread within a chain; 0 is all at once.
    """

    graph: fx.GraphModule
    domain: Domain
    choices: tuple[Choice, ...]
    batch: int
    images: int = 0

    def __call__(self, x: Tensor) -> Any:
        """The outputs for `x`; in passes of `batch` samples where samples are shown not to see each other, else at once."""
        if len(x) <= self.batch or not self.domain.apart:
            return self.graph(x)
        return _joined([self.graph(part) for part in x.split(self.batch)])


class CompiledModel(nn.Module):
    """A model in eval mode, lowered: pictures in, the original's outputs out, without gradients.

    It gives what the masked model gives, up to rounding, or raises an NmfxError before anything is computed:

    - *Sizes and batches.* It was lowered for the example's sizes, and for all batches from 2 on that torch.export could keep
      free; for the example's batch alone where that is 1 or cannot be free, since models may do something else with it. For
      other sizes and batches the model is exported and lowered once more at the first call, which takes seconds, with the same
      choices and layers: nothing is timed again, and `compile` with an example of that size may find faster ways. Up to
      `shapes` of these are kept beside the first, then the oldest goes. The original model, with all its weights, is kept for
      that; ``shapes=0`` keeps none and refuses. Threads wait for each other only while a size is new.
    - *State.* A model whose forward pass writes to a buffer is refused: its outputs depend on the calls before.
    - *Kinds.* Another type of numbers than the example's, another device or number of dimensions is refused, and so is
      autocast, under which the masked model would give bfloat16.
    - *Passes.* A batch larger than `batch` is cut into passes only where the graph shows that samples do not see each other
      and that all outputs have the batch first.
    - *Inf and NaN* in activations spread through a dropped weight in the masked model (0 * inf is NaN), and not here, where
      it is not there; and the clamps of dense sites, which are oneDNN's, make 0 of NaN. Look for them before, not after.

    `copy.deepcopy` copies it. It cannot be saved: loading a pickle runs code. Save the model (`save_checkpoint`), load it and
    compile it again.

    Attributes:
        graph: the lowered graph for the example's sizes.
        choices: how each site is computed.
        batch: samples of a pass; larger batches go through in several, so that activations stay in the cache.
        kernel: why the kernel is missing; empty when it is there.
    """

    def __init__(self, lowered: Lowered, *, kernel: str = "", original: nn.Module | None = None, shapes: int = SHAPES) -> None:
        super().__init__()
        self.graph, self.kernel = lowered.graph, kernel
        self.others: tuple[Lowered, ...] = ()
        self.shapes = shapes
        self._first = lowered
        self._original = (original,) if original is not None and shapes else ()  # no submodule: its state is not this one's
        self.eval()

    @property
    def choices(self) -> tuple[Choice, ...]:
        """How each site is computed, in the order of the graph."""
        return self._first.choices

    @property
    def batch(self) -> int:
        """Samples of a pass."""
        return self._first.batch

    @torch.no_grad()
    def forward(self, x: Tensor) -> Any:
        """The outputs of the original model for `x` ``(batch, ...)``, up to rounding.

        Raises:
            NmfxError: the input is of a kind that the model was not compiled for, or of a size that it does not take.
        """
        self._check(x)
        x = x.contiguous()
        lowered = next((one for one in (self._first, *self.others) if one.domain.takes(x)), None)
        return (lowered or self._lower(x))(x)

    def _check(self, x: Tensor) -> None:
        if not isinstance(x, Tensor) or x.is_nested:
            raise NmfxError(f"{self._made_for()}, got {type(x).__name__ if not isinstance(x, Tensor) else 'a nested tensor'}")
        wanted = self._first.domain
        fits = x.dtype == wanted.dtype and x.dim() == len(wanted.shape)
        if not fits or x.device.type != "cpu" or x.layout != torch.strided:
            layout = "" if x.layout == torch.strided else f", {x.layout}"
            raise NmfxError(f"{self._made_for()}, got {_kind(x.dtype)} {tuple(x.shape)} on {x.device}{layout}")
        if torch.is_autocast_enabled("cpu"):
            raise NmfxError(f"{self._made_for()}, to compute in float32, as the model does not under autocast: leave it")

    def _made_for(self) -> str:
        wanted = self._first.domain
        least, most = wanted.batches
        sizes = ", ".join(map(str, wanted.shape[1:]))
        batch = str(least) if least == most else f"{least} or more" if most is None else f"{least} to {most}"
        return f"compiled for {_kind(wanted.dtype)} of sizes ({sizes}) in batches of {batch}, on cpu"

    def _lower(self, x: Tensor) -> Lowered:
        """A lowering for inputs of this size, kept for the next call."""
        came = f"{_kind(x.dtype)} {tuple(x.shape)}"
        if not self._original:
            raise NmfxError(f"{self._made_for()}, got {came}: compile with an example of that size, or without shapes=0")
        with EXPORTING:
            known = next((one for one in self.others if one.domain.takes(x)), None)
            if known is not None:  # by another thread
                return known
            try:
                lowered = lower_again(self._first, self._original[0], x, kernel=not self.kernel)
            except ModelError as error:
                raise NmfxError(f"{self._made_for()}, got {came}, which it does not take: {error}") from error
            self.others = (*self.others, lowered)[-self.shapes :]
            return lowered

    def train(self, mode: bool = True) -> CompiledModel:
        """Does nothing: a compiled model stays in eval mode."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompiledModel:
        """Refuses to be moved or converted: the packed weights are float32 on the CPU."""
        probe = fn(torch.zeros(1, 1, 1, 1))
        if probe.dtype != torch.float32 or probe.device.type != "cpu":
            raise NmfxError(f"a compiled model stays float32 on the CPU, asked for {_kind(probe.dtype)} on {probe.device}")
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the weights have been packed."""
        raise NmfxError("a compiled model takes no other weights: load them into the model, and compile it")

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refused: it cannot be pickled."""
        raise NmfxError(
            "a compiled model cannot be saved, nor sent to another process: loading a pickle runs code. Save the model with "
            "nmfx.save_checkpoint, load it and compile it there"
        )

    def __copy__(self) -> CompiledModel:
        new = type(self).__new__(type(self))
        new.__dict__ = {name: copy.copy(value) if isinstance(value, dict) else value for name, value in self.__dict__.items()}
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledModel:
        new = memo[id(self)] = type(self).__new__(type(self))
        with EXPORTING:
            new.__dict__ = copy.deepcopy(self.__dict__, memo)
        return new

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: what is here cannot be loaded into anything."""
        raise NmfxError("a compiled model has no state to save: save the model it was compiled from, with nmfx.save_checkpoint")


def _kind(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@torch.inference_mode(False)  # whose tensors have no versions
def lower_again(first: Lowered, model: nn.Module, example: Tensor, *, kernel: bool) -> Lowered:
    """A baked model lowered for an example of another size with the choices of the first, whose layers are shared.

    Raises:
        ModelError: torch.export cannot follow the model with this example.
    """
    if 0 in example.shape[1:]:
        raise ModelError("there are no pixels")
    graph, domain = export(model, example.clone())
    choices = defaultdict[str, list[Choice]](list)
    for choice in first.choices:
        choices[choice.name].append(choice)
    known = [module for module in first.graph.modules() if isinstance(module, LAYERS)]
    for node, fused in lower(graph):
        mine = choices[fused.name]
        layer = _possible_layer(fused, mine.pop(0) if mine else None)
        graph.add_submodule(str(node.target), next((one for one in known if alike(one, layer)), layer))
    graph.recompile()
    if kernel:
        link(graph, first.images)
    return Lowered(graph, domain, first.choices, first.batch, first.images)


def _possible_layer(fused: Fused, choice: Choice | None) -> nn.Module:
    """The layer of a choice that was made for another size; the dense one where this site cannot be computed so."""
    tiles = () if fused.depthwise else map(str, TILES)
    chosen = choice.chosen if choice and choice.chosen in {*dense_layers(fused, lanes=True), *tiles} else "dense"
    return layer_for(fused, chosen, choice.plain if choice else None)


def _joined(parts: list[Any]) -> Any:
    """Outputs of several passes as those of one: tensors joined along the batch, in whatever tree they stand."""
    return tree_map(lambda *each: torch.cat(each) if isinstance(each[0], Tensor) else each[0], parts[0], *parts[1:])


@torch.inference_mode(False)  # whose tensors have no versions
def compile(
    model: nn.Module, example_input: Tensor, *, batch: int | None = None, shapes: int = SHAPES, progress: Progress = silent
) -> CompiledModel:
    """Lower a converted, baked or plain model for this machine.

    Every convolution and linear layer is fused with its batch norm, residual and clamp, and computed by PyTorch's dense
    operator or by the sparse kernel, whichever is faster here for this shape; what was measured is kept on disk.
    The outputs are the model's up to rounding, for other sizes and batches too (`CompiledModel` says how, and what is refused).

    Args:
        example_input: a batch of the size and shape to be fast for.
        batch: samples of a pass, where samples do not see each other; None measures 1, 2, 4, ... up to the example's, and one
            at a time on each thread.
        shapes: how many other sizes and batches a lowering is made and kept for, when they come; 0 refuses them, and the
            model's dense weights are not kept.
        progress: called with the share done and the site.

    Returns:
        A `CompiledModel`; `model` is not changed.

    Raises:
        ModelError: torch.export cannot follow the model, or an argument is none that it takes.
    """
    if isinstance(example_input, Tensor) and example_input.is_nested:
        raise ModelError("compile: expected a plain tensor, got a nested one")
    if not isinstance(example_input, Tensor) or not example_input.dim() or not example_input.numel():
        came = tuple(example_input.shape) if isinstance(example_input, Tensor) else type(example_input).__name__
        raise ModelError(f"compile: expected a batch of pictures as a tensor, got {came}")
    if example_input.device.type == "meta" or example_input.layout != torch.strided:
        raise ModelError(
            f"compile: expected a plain tensor with values, got one on {example_input.device}, {example_input.layout}"
        )
    counts = [type(count) is int for count in (1 if batch is None else batch, shapes)]
    if not all(counts) or (batch is not None and batch < 1) or shapes < 0:
        raise ModelError(f"compile: expected passes of 1 sample or more, and shapes of 0 or more, got {batch!r} and {shapes!r}")
    if torch.is_autocast_enabled("cpu"):
        raise ModelError("compile: compiled models compute in float32; leave autocast around compile and its calls")
    example = example_input.detach().cpu().clone(memory_format=torch.contiguous_format)
    plain = bake(model).cpu().eval()
    kernel = load_kernel()
    with keep_modes(plain):
        graph, domain = export(plain, example)
    sites = lower(graph)
    found = list[Lowered]()
    passes = _passes(len(example), batch, domain.apart, alone=not kernel)
    for number, (size, alone) in enumerate(passes):
        with _one_thread() if alone else contextlib.nullcontext():
            times = Times()
            timed = time_sites(copy_of(graph), sites, example[:size], times, portion(progress, number, len(passes)))
            times.save()
            for mine, choices in with_and_without_lanes(graph, timed, images=size if alone else 0):
                found.append(Lowered(mine, domain, choices, len(example) if alone else size, size if alone else 0))
    return CompiledModel(fastest(found, example), kernel=kernel, original=plain, shapes=shapes)


def _passes(count: int, batch: int | None, apart: bool, *, alone: bool) -> list[tuple[int, bool]]:
    """The ways to try to cut a batch of `count`: samples of a pass, and whether each pass stays on one thread."""
    threads = torch.get_num_threads()
    if batch is not None or not apart:
        return [(batch if batch and apart else count, False)]
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
    """A copy of a lowered graph over the same tensors, whose sites can be given other layers."""
    with EXPORTING:
        return fx.GraphModule(graph, copy.deepcopy(graph.graph))


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
        times: what was measured before, and takes what is measured now.
        progress: called with the share done and the site's name.

    Returns:
        The sites in the same order, with their times.
    """
    seen, timed = inputs_of(graph, sites, example), []
    for index, (node, fused) in enumerate(sites):
        progress(index / len(sites), fused.name)
        timed.append(time_site(node, fused, seen[str(node.target)], times))
    return timed


def with_and_without_lanes(
    graph: fx.GraphModule, timed: Sequence[TimedSite], *, images: int = 0
) -> Iterator[tuple[fx.GraphModule, tuple[Choice, ...]]]:
    """Copies of a lowered graph with the fastest layers, chained: one without lanes, and one with them if a site has any.

    Args:
        images: samples that stay on one thread within a chain; 0 is all at once.
    """
    for lanes in (False, True):
        choices = tuple(one.choice(lanes=lanes) for one in timed)
        if not lanes or any(LANES in choice.chosen for choice in choices):
            mine = copy_of(graph)
            install_layers(mine, timed, choices)
            if not load_kernel():
                link(mine, images)
            yield mine, choices


@torch.no_grad()
def fastest(models: Sequence[Lowered], example: Tensor) -> Lowered:
    """The fastest of several lowerings of one model, measured on `example`."""
    if len(models) == 1:
        return models[0]
    took = measure({str(index): partial(one, example) for index, one in enumerate(models)}, seconds=NETWORK_SECONDS)
    return models[min(range(len(models)), key=lambda index: took[str(index)])]


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
    """Whether a site can be computed on pictures that are laid out as lanes."""
    if not fused.is_conv or inputs[0].dim() != 4:
        return False
    kernel = tuple(fused.weight.shape[2:])
    out = output_size(inputs[0], kernel, *fused.geometry)
    return window_of(inputs[0].shape[2:], out, kernel, *fused.geometry) is not None


def layer_for(fused: Fused, chosen: str, plain: str | None = None) -> nn.Module:
    """The layer that computes a site in the way called `chosen` (see `Choice`); `plain` is used where there are no lanes."""
    if chosen.startswith(SPARSE):
        tiles = {str(tile): tile for tile in TILES}
        return sparse_layer(fused, tiles[chosen], tiles.get(plain or ""))
    return dense_layers(fused, lanes=True)[chosen]
