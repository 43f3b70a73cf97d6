"""correct(model, batches): kept weights get new values, so that each layer's outputs come back to the dense network's."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nmfx import text
from nmfx.errors import NmfxError
from nmfx.masking.sites import masked_sites, respec
from nmfx.passes.layerwise import Corrected, LayerwiseCorrection
from nmfx.passes.lockstep import moved, running
from nmfx.passes.network import Network
from nmfx.passes.resuming import Ledger, digest
from nmfx.progress import Progress, silent
from nmfx.sparsity.correction import CORRECTIONS


@torch.no_grad()
def correct(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    dense: nn.Module | None = None,
    method: str = "admm",
    seed: int = 0,
    memory: float = 1.5e9,
    checkpoint: Path | None = None,
    progress: Progress = silent,
) -> list[Corrected]:
    """Give the kept weights of a converted model values that bring every layer's outputs back to the dense network's, in place.

    Layer after layer, in the order in which they run: the inputs are those of the network corrected so far, the targets the
    dense network's outputs on the same pictures. Masks are chosen with the values; dropped weights become zero. Weights without
    a mask are corrected too (all of them are kept), biases take up means, and batch norms are matched on the way, as
    `recalibrate_bn` with `dense` does; a product whose output is added to a shortcut aims at the dense network's sum. No labels
    and no training; one forward pass of each network.

    Args:
        model: as `transform` gives it.
        batches: inputs, or ``(input, label, ...)`` tuples, as a loader gives them: some hundreds of pictures. An input is a
            tensor, a tuple of positional or a dict of named arguments. Every eighth (of fewer than 8 batches: of their
            pieces) is held back and decides for each weight between corrected, damped more, and plain.
        dense: the network to come back to; by default the weights behind the masks, which are dense before any training or
            correction; give it where they are not.
        method: one of `nmfx.sparsity.correction.CORRECTIONS`.
        seed: of the positions that are drawn from large feature maps.
        memory: bytes of activations to hold at once. Batches that do not fit at first take part from the layer on at which they
            do, at least 8 from the start.
        checkpoint: a safetensors file to write after weights that are done (as often as that takes a tenth of the time) and
            to go on from, to the same result; it stays until the caller removes it.
        progress: told of each weight that is done.

    Returns:
        What became of each weight, in the order in which they run; then masked ones that no product reads as they are stored
        (standardised weights, weights that are copied first). These are masked by magnitude, as `bake` would. A weight that is
        used several times is fitted to its first use.

    Raises:
        NmfxError: an unknown method, no batches or some that hold infinite or NaN values, a model without masks, a `dense`
            network of another kind, a checkpoint of another correction, or a forward pass that fails or takes another way for
            another picture. The model is left as it was.
    """
    if method not in CORRECTIONS:
        raise NmfxError(f"unknown correction {method!r}{text.nearest(method, CORRECTIONS)}; known: {', '.join(CORRECTIONS)}")
    if not isinstance(memory, int | float) or not memory > 0:
        raise NmfxError(f"correct: memory={memory!r}: expected bytes, above 0")
    specs = {site.spec.name: site.spec for site in masked_sites(model)}
    if not specs:
        raise NmfxError("correct: the model has no masked weights; transform it first")
    sparse, target = Network(model, specs, keep_derived=True), Network(model if dense is None else dense, specs)
    if sparse.shapes != target.shapes:
        odd = min(sparse.shapes.items() ^ target.shapes.items())[0]
        raise NmfxError(f"correct: dense has another {odd}; give the dense version of this network")
    device = next(sparse.model.parameters()).device
    inputs = inputs_of(batches, device)
    for site in masked_sites(model):
        if not site.spec.derived:
            sparse.weights[site.spec.name].mul_(site.mask)  # the model's own: by its score, or fixed
    settings: dict[str, Any] = {"method": method, "seed": seed, "memory": memory}
    if checkpoint is not None:
        settings |= {"scheme": digest([], str(list(specs.values()))), "pictures": digest(inputs)}
        settings |= {"weights": digest(sparse.values), "dense weights": digest(target.values)}
    ledger = Ledger(checkpoint, settings, sparse)
    done, records = ledger.load()
    job = LayerwiseCorrection(
        sparse, target, method, seed, len(inputs), memory, progress, save=ledger.save, done=done, records=records
    )
    try:
        with (
            torch.autocast(device.type, enabled=False),
            running(sparse.model, inputs, sparse.wanted, sparse.keep) as runs,
            running(target.model, inputs, target.wanted, target.keep) as others,
        ):
            for network in (sparse, target):
                network.look_ahead(inputs[0])
            job.run(runs, others)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        what = str(error).splitlines()[0] if str(error) else repr(error)
        raise NmfxError(f"correct: {type(model).__name__} cannot be run on these batches: {what}") from error
    values = sparse.values
    for name, own in itertools.chain(model.named_parameters(), model.named_buffers()):
        if name in values and not torch.equal(own, values[name]):
            own.copy_(values[name])
    frozen = [site for site in masked_sites(model) if site.spec.frozen]
    respec(frozen, frozen=False)
    for site in frozen:
        _ = site.mask  # the mask of the new values is the one to hold
    respec(frozen, keep_masks=True, frozen=True)
    seen = {one.name for one in job.records}
    return job.records + [Corrected(name, "plain: no product reads it as it is stored") for name in specs if name not in seen]


def inputs_of(batches: Iterable[Any], device: torch.device) -> list[Any]:
    """Inputs of the forward passes, without labels; fewer than 8 batches are cut into pieces, so that some can be held back."""
    if isinstance(batches, Tensor | str | dict) or not isinstance(batches, Iterable):
        raise NmfxError(f"correct: expected batches, as a list or a loader gives them, got {type(batches).__name__}")
    inputs = []
    for batch in batches:
        x = batch[0] if isinstance(batch, list | tuple) else batch
        tensors = [leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor)]
        if not tensors:
            raise NmfxError(f"correct: expected batches of tensors, got {type(x).__name__}")
        if not all(bool(t.isfinite().all()) for t in tensors if t.is_floating_point()):
            raise NmfxError("correct: a batch holds infinite or NaN values")
        if all(len(t) for t in tensors if t.dim()):
            inputs.append(moved(x, device))
    if not inputs:
        raise NmfxError("correct: no batches of pictures to look at")
    if len(inputs) < 8 and all(isinstance(x, Tensor) and x.dim() for x in inputs):
        pieces = math.ceil(8 / len(inputs))
        inputs = [piece for x in inputs for piece in x.split(max(1, math.ceil(len(x) / pieces)))]
    return inputs
