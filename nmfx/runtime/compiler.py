"""compile(model, example): the same outputs, each site computed the fastest way this machine knows."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from nmfx.errors import ModelError
from nmfx.masking.modes import keep_modes
from nmfx.passes.baking import bake
from nmfx.progress import Progress, silent
from nmfx.runtime.chain import link
from nmfx.runtime.compiled import SHAPES, CompiledModel, Lowered
from nmfx.runtime.kernel.library import load_kernel
from nmfx.runtime.layout.tiles import LANES
from nmfx.runtime.lowering.exporting import copy_of, export
from nmfx.runtime.lowering.fusion import lower
from nmfx.runtime.measuring.choices import Choice, TimedSite, install_layers, time_sites
from nmfx.runtime.measuring.timing import HOPELESS, NETWORK_SECONDS, QUICK_ROUNDS, Times, measure, on_threads, portion
from nmfx.runtime.quantized.compiling import agreement, calibration_batches, in_bytes

SURELY = 1.2  # times as long


@torch.inference_mode(False)  # whose tensors have no versions
def compile(
    model: nn.Module,
    example_input: Tensor,
    *,
    batch: int | None = None,
    shapes: int = SHAPES,
    tune: str = "quick",
    precision: str = "float32",
    calibration: Iterable[Any] | None = None,
    float32: Collection[str] = (),
    progress: Progress = silent,
) -> CompiledModel:
    """Lower a converted, baked or plain model for this machine.

    Every convolution and linear layer is fused with its batch norm, residual and clamp, and computed by PyTorch's dense
    operator or by the sparse kernel, whichever is faster here for this shape; what was measured is kept on disk.
    In float32 the outputs are the model's up to rounding, for other sizes and batches too (`CompiledModel` says how and what is
    refused).

    Args:
        example_input: a batch of the size and shape to be fast for.
        batch: samples of a pass, where samples do not see each other; None measures the example's and 1, on all threads or
            one on each.
        shapes: how many other sizes and batches a lowering is made and kept for, when they come; 0 refuses them, and the
            model's dense weights are not kept.
        tune: ``quick`` times few ways to compute a site in short turns, those among which the fastest is within a few percent;
            ``full`` all of them in long turns, and passes of 2, 4, ... samples too, which takes several times as long.
        progress: called with the share done and what is being done.

    Returns:
        A `CompiledModel`; `model` is not changed.

    Raises:
        ModelError: torch.export cannot follow the model, or an argument is none that it takes; int8 without the kernel.
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
    if tune not in ("quick", "full"):
        raise ModelError(f"compile: expected tune='quick' or 'full', got {tune!r}")
    if torch.is_autocast_enabled("cpu"):
        raise ModelError("compile: compiled models compute in float32; leave autocast around compile and its calls")
    example = example_input.detach().cpu().clone(memory_format=torch.contiguous_format)
    if precision not in ("float32", "int8"):
        raise ModelError(f"compile: expected precision='float32' or 'int8', got {precision!r}")
    if precision == "float32" and (calibration is not None or float32):
        raise ModelError("compile: calibration and float32 say nothing without precision='int8'")
    plain = bake(model).cpu().eval()
    kernel = load_kernel()
    progress(0.0, "following the model")
    with keep_modes(plain):
        graph, domain = export(plain, example)
    sites = lower(graph)
    if precision == "int8":
        if kernel:
            raise ModelError(f"compile: int8 needs the kernel: {kernel}")
        if calibration is None:
            raise ModelError("compile: precision='int8' needs calibration: batches of pictures, as the network is used on")
        batches = calibration_batches(calibration, example)
        lowered = in_bytes(graph, domain, sites, example, batches, keep=float32, progress=progress)
        made = fastest(lowered, example, quick=True)
        return CompiledModel(made, shapes=0, agreement=agreement(plain, made, batches))
    found = list[Lowered]()
    quick = tune == "quick"
    passes = _passes(len(example), batch, domain.apart, alone=not kernel, quick=quick)
    for number, (size, alone) in enumerate(passes):
        with on_threads(1 if alone else torch.get_num_threads()):
            times = Times(quick=quick)
            timed = time_sites(copy_of(graph), sites, example[:size], times, portion(progress, number, len(passes)))
            times.save()
            for mine, choices in with_and_without_lanes(graph, timed, images=size if alone else 0, surely=quick):
                found.append(Lowered(mine, domain, choices, len(example) if alone else size, size if alone else 0))
    progress(1.0, "timing the whole network")
    return CompiledModel(fastest(found, example, quick=quick), kernel=kernel, original=plain, shapes=shapes)


def _passes(count: int, batch: int | None, apart: bool, *, alone: bool, quick: bool) -> list[tuple[int, bool]]:
    """The ways to try to cut a batch of `count`: samples of a pass, and whether each pass stays on one thread."""
    threads = torch.get_num_threads()
    if batch is not None or not apart:
        return [(batch if batch and apart else count, False)]
    each = [(1, True)] if alone and 1 < threads <= count else []
    if quick:
        return [*(each or [(1, False)]), (count, False)] if count > 1 else [(1, False)]
    return [*((2**i, False) for i in range(count.bit_length()) if 2**i <= count), *each]


def with_and_without_lanes(
    graph: fx.GraphModule, timed: Sequence[TimedSite], *, images: int = 0, surely: bool = False
) -> Iterator[tuple[fx.GraphModule, tuple[Choice, ...]]]:
    """Copies of a lowered graph with the fastest layers, chained: one without lanes, and one with them if a site has any.

    Args:
        images: samples that stay on one thread within a chain; 0 is all at once.
        surely: leave the one without out where its sites take so much longer that the rest cannot make up for it.
    """
    without, with_them = (sum(one.choice(lanes=lanes).seconds for one in timed) for lanes in (False, True))
    for lanes in (True,) if surely and without > SURELY * with_them else (False, True):
        choices = tuple(one.choice(lanes=lanes) for one in timed)
        if not lanes or any(LANES in choice.chosen for choice in choices):
            mine = copy_of(graph)
            install_layers(mine, timed, choices)
            if not load_kernel():
                link(mine, images)
            yield mine, choices


@torch.no_grad()
def fastest(models: Sequence[Lowered], example: Tensor, *, quick: bool = False) -> Lowered:
    """The fastest of several lowerings of one model, measured on `example`."""
    if len(models) == 1:
        return models[0]
    runs = {str(index): partial(one, example) for index, one in enumerate(models)}
    if quick:
        took = measure(runs, rounds=QUICK_ROUNDS, seconds=NETWORK_SECONDS / 4, hopeless=HOPELESS, enough=NETWORK_SECONDS)
    else:
        took = measure(runs, seconds=NETWORK_SECONDS)
    return models[min(range(len(models)), key=lambda index: took[str(index)])]
