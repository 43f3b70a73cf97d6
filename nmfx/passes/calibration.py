"""Calibration: a few hundred pictures looked at without updates, and what they say of the inputs and gradients of sites.

Collected here: sums of squares of what each weight is multiplied with (`input_squares`), and gradients
(`batch_gradients`); scores, sensitivities and corrections read them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from nmfx.errors import SearchError
from nmfx.masking.copies import throw_away_copy
from nmfx.models.following import Census
from nmfx.models.products import Operand
from nmfx.models.site import Site, Sites, weight_of
from nmfx.models.storages import storage_of
from nmfx.sparsity.layout import Rows
from nmfx.sparsity.score import check_score

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Calibration:
    """Batches ``(input, label)``; a search scores schemes on the second half. Without labels they are empty tensors."""

    batches: Sequence[Batch]

    @staticmethod
    def of(data: Iterable[Any]) -> Calibration:
        """Batches as a loader gives them: ``(input, label, ...)``.

        Raises:
            SearchError: there are none, they are no tensors, or not finite.
        """
        if not isinstance(data, Iterable):
            raise SearchError(f"data: expected batches (input, label) of tensors, got {type(data).__name__}")
        batches = []
        for batch in data:
            x, *rest = batch if isinstance(batch, list | tuple) else (batch,)
            if not isinstance(x, Tensor) or (rest and not isinstance(rest[0], Tensor)):
                raise SearchError("data: expected batches (input, label) of tensors, as a loader gives them")
            if x.is_floating_point() and not bool(x.isfinite().all()):
                raise SearchError("data: a batch holds infinite or NaN values")
            batches.append((x, rest[0] if rest else torch.empty(0, dtype=torch.int64)))
        if not batches:
            raise SearchError("data: no batches to look at")
        return Calibration(tuple(batches))

    def need_labels(self, who: str) -> None:
        """Raise unless every batch has a label for each picture."""
        if any(len(label) != len(x) for x, label in self.batches):
            raise SearchError(f"{who} needs labels: give batches (input, label), one class index a picture")

    @property
    def for_statistics(self) -> Sequence[Batch]:
        """The half that batch norms are recalibrated on (everything, if there is but one batch)."""
        return self.batches[: max(1, len(self.batches) // 2)]

    @property
    def held_back(self) -> Sequence[Batch]:
        """The half that schemes are scored on."""
        return self.batches[len(self.batches) // 2 :]


@contextlib.contextmanager
def explain_failure(model: nn.Module) -> Iterator[None]:
    """Say in plain words why a model cannot run on the pictures or learn from the labels.

    Raises:
        SearchError: instead of what torch raises for shapes and labels that do not fit.
    """
    try:
        yield
    except (RuntimeError, IndexError, ValueError, TypeError, AttributeError) as error:
        what = str(error).splitlines()[0] if str(error) else repr(error)
        raise SearchError(
            f"data: {type(model).__name__} cannot be run on it or scored: {what}; "
            f"expected inputs as the model takes them, labels 0..classes-1, and one tensor of logits (batch, classes) out of it"
        ) from error


def score_evidence(
    model: nn.Module, sites: Sites, score: str, calibration: Calibration | None, names: Iterable[str] | None = None
) -> dict[str, Tensor]:
    """What a score needs beside the weights, by site name; nothing for those that need nothing (see `Score.needs`).

    Args:
        model: dense or masked; its dense weights run, in eval mode, on a copy.
        sites: its sites.
        score: one of `nmfx.sparsity.score.SCORES`.
        calibration: the batches to look at.
        names: the sites to say it of, if not all.

    Returns:
        Float32 tensors that broadcast to `Site.rows`: see `input_squares`, or the mean squared gradient of each weight.

    Raises:
        SearchError: no such score; no batches or labels where it needs them, or batches that the model cannot run on.
    """
    if (needs := check_score(score, SearchError).needs) == "nothing":
        return {}
    if calibration is None:
        raise SearchError(f"score {score!r} looks at pictures: give data= (--data), or use 'magnitude'")
    chosen = [site for site in sites if names is None or site.name in set(names)]
    copied = throw_away_copy(model, None).eval()
    with explain_failure(model):
        if needs == "inputs":
            return input_squares(copied, chosen, calibration.batches)
        calibration.need_labels(f"score {score!r}")
        found = {site.name: weight_of(copied, site).new_zeros(site.rows, dtype=torch.float32) for site in chosen}
        for _, gradients in batch_gradients(copied, chosen, calibration.batches):
            for site, gradient in zip(chosen, gradients, strict=True):
                if gradient is not None:
                    found[site.name] += gradient.float().square().reshape(site.rows) / len(calibration.batches)
    return found


def batch_gradients(
    model: nn.Module, sites: Sequence[Site], batches: Iterable[Batch]
) -> Iterator[tuple[int, tuple[Tensor | None, ...]]]:
    """Pictures in a batch and the gradients of its mean cross-entropy for the sites' weights, batch by batch.

    `model` is a copy to spoil: only these weights require gradients afterwards.
    """
    parameters = [weight_of(model, site) for site in sites]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    device = parameters[0].device if parameters else torch.device("cpu")
    for x, label in batches:
        loss = nn.functional.cross_entropy(model(x.to(device)), label.to(device))
        yield len(label), torch.autograd.grad(loss, parameters, allow_unused=True)


@torch.no_grad()
def input_squares(model: nn.Module, sites: Iterable[Site], batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Sums of squares of the input that each entry of a site's group axis meets, over all batches and places.

    Returns:
        By site name ``(outer or 1, length, 1)``, broadcastable to `Site.rows`; a one where the operands did not say.
    """
    collector = _InputSquares(list(model.parameters()))
    for x, _ in batches:
        collector.see(model, x)
    return {site.name: collector.of(weight_of(model, site), site.rows) for site in sites}


class _InputSquares(Census):
    """Sums of squares of the input that each entry of the group axis meets, collected over forward passes."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, ())
        self.parameters = parameters
        self.sums: dict[int, Tensor] = {}
        self.call: tuple[str, Any] = ("", ())

    def see(self, model: nn.Module, x: Tensor) -> None:
        """Run one batch; storages of the batch before are gone, so provenance starts anew."""
        x = x.to(self.parameters[0].device)
        Census.__init__(self, self.parameters, (x,))
        with self:
            model(x)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.call = (func._schema.name, args)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _record_weight(self, operand: Operand) -> None:
        if (squares := self._squares(operand)) is not None:
            for parameter in self.storages.held[storage_of(operand.tensor)].parameters:
                before = self.sums.get(id(parameter))
                fits = before is not None and before.shape == squares.shape
                self.sums[id(parameter)] = before + squares if fits and before is not None else squares
        super()._record_weight(operand)

    def _squares(self, operand: Operand) -> Tensor | None:
        """``(outer or 1, length, 1)`` sums of squares, or None where the operands do not say."""
        name, args = self.call
        if name == "aten::convolution":
            x = args[0].detach().float()
            channels = x.square().sum(dim=[0, *range(2, x.dim())])
            per_group = channels.reshape(operand.conv_groups, -1, 1)  # (g, in / g, 1)
            filters = 1 if args[6] else operand.tensor.shape[0] // operand.conv_groups
            return cast(Tensor, per_group.repeat_interleave(filters, dim=0))
        others = [t for t in args if isinstance(t, Tensor) and t is not operand.tensor and t.dim() > 1]
        if not others:
            return None
        other, dim = others[-1].detach().float(), -1 if operand.dim == -2 or name == "aten::linear" else -2
        other = args[0].detach().float() if name == "aten::linear" else other
        squares = other.square().movedim(dim, -1).flatten(0, -2).sum(0)
        return cast(Tensor, squares.reshape(1, -1, 1))

    def of(self, parameter: nn.Parameter, rows: Rows) -> Tensor:
        """What was collected, broadcastable to `rows`."""
        found = self.sums.get(id(parameter))
        if found is None or found.shape[1] != rows[1] or found.shape[0] not in (1, rows[0]):
            return parameter.new_ones((1, 1, 1), dtype=torch.float32)
        return found
