"""A model lowered for this machine, for the sizes it was compiled for and for others when they come."""

from __future__ import annotations

import copy
import operator
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from nmfx.errors import ModelError, NmfxError
from nmfx.runtime.chain import Chain, link
from nmfx.runtime.kernel.library import loaded
from nmfx.runtime.layers import LAYERS, Fused, alike, dense_layers, layer_for
from nmfx.runtime.layout.tiles import TILES
from nmfx.runtime.lowering.exporting import EXPORTING, Domain, export
from nmfx.runtime.lowering.fusion import lower
from nmfx.runtime.measuring.choices import Choice
from nmfx.runtime.saved.machine import Machine, this_machine
from nmfx.runtime.saved.writing import save

if TYPE_CHECKING:
    from nmfx.runtime.quantized.compiling import Agreement

SHAPES = 8  # lowerings for other sizes that are kept


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

    `copy.deepcopy` copies it, `save` writes it to a file that `nmfx.load_compiled` reads. It cannot be pickled: loading a
    pickle runs code.

    Attributes:
        graph: the lowered graph for the example's sizes.
        choices: how each site is computed.
        batch: samples of a pass; larger batches go through in several, so that activations stay in the cache.
        kernel: why the kernel is missing; empty when it is there.
        machine: where choices were made.
        agreement: of an int8 model, how near it came to float32 when it was compiled; None of others, and of those from files.
    """

    def __init__(
        self,
        lowered: Lowered,
        *,
        kernel: str = "",
        original: nn.Module | None = None,
        shapes: int = SHAPES,
        machine: Machine | None = None,
        agreement: Agreement | None = None,
    ) -> None:
        super().__init__()
        self.agreement = agreement
        self.machine, self._is_loaded = machine or this_machine(), machine is not None
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
        return f"compiled for {self._takes()}, on cpu"

    def _takes(self) -> str:
        wanted = self._first.domain
        least, most = wanted.batches
        sizes = ", ".join(map(str, wanted.shape[1:]))
        batch = str(least) if least == most else f"{least} or more" if most is None else f"{least} to {most}"
        return f"{_kind(wanted.dtype)} of sizes ({sizes}) in batches of {batch}"

    def _lower(self, x: Tensor) -> Lowered:
        """A lowering for inputs of this size, kept for the next call."""
        came = f"{_kind(x.dtype)} {tuple(x.shape)}"
        if not self._original:
            way = ", and save it" if self._is_loaded else "" if self.agreement else ", or without shapes=0"
            raise NmfxError(f"{self._made_for()}, got {came}: compile with an example of that size{way}")
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

    def save(self, path: str | Path, *, force: bool = True) -> None:
        """Write it to one file: graph, packed weights, choices and where they were made, under a SHA-256, nothing pickled.

        `nmfx.load_compiled` reads it, without the original model, its code, or a compiler. What is written is the lowering for
        the example's sizes, and its batches up to 4,096; those for other sizes are not, nor is the original model that they are
        made of, so that what is loaded refuses them as with ``shapes=0``.

        Args:
            force: overwrite an existing file.

        Raises:
            CheckpointError: its graph calls an operator that no file may call (`nmfx.runtime.saved.allowed`); it is named.
            NmfxError: the file cannot be written, or is there and `force` is false.
        """
        save(self, Path(path), force=force)

    def __repr__(self) -> str:
        """What it takes and how it computes, in a line."""
        count, sparse = len(_operators(self.graph)), sum(one.is_sparse for one in self.choices)
        kernel = "no kernel" if self.kernel else f"kernel {loaded().name}"
        return (
            f"CompiledModel({count} operators, {len(self.choices)} of them sites, {sparse} of those sparse; {self._takes()}; "
            f"passes of {self.batch}; {kernel}; threads {torch.get_num_threads()}, ways chosen for {self.machine.threads})"
        )

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
            "a compiled model cannot be saved by pickle, nor sent to another process so: loading a pickle runs code. Call its "
            "save(path), and nmfx.load_compiled(path) there"
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
        raise NmfxError("a compiled model has no state to save: call its save(path), and nmfx.load_compiled(path) to load it")


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


def _operators(graph: fx.GraphModule) -> list[fx.Node]:
    """The nodes of a lowered graph that compute something, those of its chains among them."""
    found = list[fx.Node]()
    for node in graph.graph.nodes:
        module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, Chain):
            found += _operators(module.graph)
        elif node.op.startswith("call") and node.target is not operator.getitem:
            found.append(node)
    return found


def _joined(parts: list[Any]) -> Any:
    """Outputs of several passes as those of one: tensors joined along the batch, in whatever tree they stand."""
    return tree_map(lambda *each: torch.cat(each) if isinstance(each[0], Tensor) else each[0], parts[0], *parts[1:])
