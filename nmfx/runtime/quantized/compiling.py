"""compile(..., precision="int8"): what calibrates, and the lowerings to choose from."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from nmfx.errors import ModelError
from nmfx.progress import Progress, silent
from nmfx.runtime.chain import link
from nmfx.runtime.compiled import Lowered
from nmfx.runtime.layers import dense_layers
from nmfx.runtime.lowering.exporting import Domain, copy_of
from nmfx.runtime.lowering.fusion import Sites
from nmfx.runtime.measuring.choices import Choice, install_layers, time_sites
from nmfx.runtime.measuring.timing import Times, portion
from nmfx.runtime.quantized.lowering import Quantizer

INT8 = "int8"  # what a choice says of a site that is computed so
LOOKED_AT = 64  # calibration pictures that outputs are compared on


@dataclass(frozen=True)
class Agreement:
    """How near int8 outputs come to the float32 model's, on calibration pictures.

    Attributes:
        pictures: that were looked at.
        difference: the norm of the difference by the norm of the float32 outputs, all tensors together.
        same: the share of pictures with the same class, for outputs ``(pictures, classes)``; None without such.
    """

    pictures: int
    difference: float
    same: float | None

    def __str__(self) -> str:
        same = "" if self.same is None else f", the same class for {self.same:.1%}"
        return f"int8 outputs differ by {self.difference:.2%} from float32 on {self.pictures} calibration pictures{same}"


@torch.no_grad()
def agreement(model: nn.Module, quantized: Callable[[Tensor], Any], batches: Sequence[Tensor]) -> Agreement:
    """Compare a model with its int8 lowering."""
    apart = norm = 0.0
    same, rows, pictures = 0, 0, 0
    for batch in batches[: max(1, LOOKED_AT // len(batches[0]))]:
        pairs = zip(tree_leaves(model(batch)), tree_leaves(quantized(batch)), strict=True)
        for wanted, found in ((a, b) for a, b in pairs if isinstance(a, Tensor) and a.is_floating_point()):
            apart, norm = apart + float((found - wanted).square().sum()), norm + float(wanted.square().sum())
            if wanted.dim() == 2 and wanted.shape[1] > 1:
                same, rows = same + int((found.argmax(1) == wanted.argmax(1)).sum()), rows + len(wanted)
        pictures += len(batch)
    return Agreement(pictures, math.sqrt(apart / norm) if norm else 0.0, same / rows if rows else None)


def calibration_batches(calibration: Tensor | Iterable[Any], example: Tensor) -> list[Tensor]:
    """Pictures that ranges are chosen by, in batches of the example's size.

    Args:
        calibration: a tensor ``(pictures, ...)``, or batches: tensors, or tuples whose first item is one (labels are not read).

    Raises:
        ModelError: they are of another kind or size, or fewer than a batch.
    """
    found = []
    for batch in (calibration,) if isinstance(calibration, Tensor) else calibration:
        x = batch[0] if isinstance(batch, list | tuple) and batch else batch
        if not isinstance(x, Tensor) or x.dtype != example.dtype or x.shape[1:] != example.shape[1:]:
            came = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            wanted = ", ".join(map(str, example.shape[1:]))
            raise ModelError(f"calibration: expected pictures of {example.dtype} (batch, {wanted}), as the example, got {came}")
        found.append(x.detach().cpu())
    joined = torch.cat(found) if found else example[:0]
    whole = len(joined) // len(example) * len(example)
    if not whole:
        raise ModelError(
            f"calibration: expected at least one batch of {len(example)} pictures, as the example, got {len(joined)}"
        )
    if not bool(torch.isfinite(joined).all()):
        raise ModelError("calibration: expected finite pictures, got NaN or inf")
    return list(joined[:whole].split(len(example)))


def in_bytes(
    graph: fx.GraphModule,
    domain: Domain,
    sites: Sites,
    example: Tensor,
    batches: list[Tensor],
    *,
    keep: Collection[str] = (),
    passes: Sequence[int] | None = None,
    progress: Progress = silent,
) -> list[Lowered]:
    """Lowerings of a graph to int8, alike but for how threads share a batch.

    Args:
        graph: lowered; changed in place.
        sites: of the graph.
        batches: that ranges are chosen by.
        keep: names of sites that stay float32.
        passes: how many samples stay on one thread, for each lowering (see `Lowered.images`); None: what may be fastest.

    Raises:
        ModelError: a name of `keep` is no site's.
    """
    if unknown := sorted(set(keep) - {fused.name for _, fused in sites}):
        raise ModelError(
            f"float32: {unknown[0]} is no site of this model, which has {', '.join(f.name for _, f in sites[:3])}, ..."
        )
    for node, fused in sites:
        graph.add_submodule(str(node.target), next(iter(dense_layers(fused).values())))
    progress(0.0, "calibrating")
    quantizer = Quantizer(graph, sites, batches, keep=keep)
    rest = [one for one in sites if quantizer.reasons[str(one[0].target)]]
    times = Times(quick=True)
    timed = time_sites(copy_of(graph), rest, example, times, portion(progress, 1, 2))
    times.save()
    made = [one.choice(lanes=False) for one in timed]
    install_layers(graph, timed, made)
    quantizer.run()
    plain = {str(one.node.target): choice for one, choice in zip(timed, made, strict=True)}
    choices = tuple(_choice(node, fused, quantizer.reasons, plain) for node, fused in sites)
    count, threads = len(example), torch.get_num_threads()
    found = []
    for images in passes or ([1, 0] if domain.apart and 1 < threads <= count else [0]):
        mine = copy_of(graph)
        link(mine, images)
        found.append(Lowered(mine, domain, choices, count, images))
    return found


def _choice(node: fx.Node, fused: Any, reasons: dict[str, str], plain: dict[str, Choice]) -> Choice:
    name = str(node.target)
    if name in plain:
        return replace(plain[name], reason=reasons[name])
    return Choice(
        fused.name, tuple(fused.weight.shape), fused.kept, None, None, "dense" if reasons[name] else INT8, None, reasons[name]
    )
