"""What a search may look at beside the weights: pictures with labels, in two halves, and whole schemes tried out on them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from nmfx.errors import SearchError
from nmfx.masking.copies import throw_away_copy
from nmfx.models.site import weight_of
from nmfx.passes.statistics import recalibrate_bn
from nmfx.search.problem import Problem
from nmfx.sparsity.mask import make_mask
from nmfx.sparsity.pattern import Pattern

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Evidence:
    """Batches ``(input, label)``; the second half is held back to score schemes on. Without labels they are empty tensors."""

    batches: Sequence[Batch]

    @staticmethod
    def of(data: Iterable[Any]) -> Evidence:
        """Take batches as a loader gives them: ``(input, label, ...)``.

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
        return Evidence(tuple(batches))

    def need_labels(self, who: str) -> None:
        """Raise unless every batch has a label for each picture."""
        if any(len(label) != len(x) for x, label in self.batches):
            raise SearchError(f"{who} needs labels: give batches (input, label), one class index a picture")

    @property
    def shown(self) -> Sequence[Batch]:
        """The half for statistics (everything, if there is but one batch)."""
        return self.batches[: max(1, len(self.batches) // 2)]

    @property
    def held_back(self) -> Sequence[Batch]:
        """The half for scores."""
        return self.batches[len(self.batches) // 2 :]


@contextlib.contextmanager
def understood(model: nn.Module) -> Iterator[None]:
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


def loss_on(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Mean cross-entropy of `model`, in the mode it is in."""
    total, count = 0.0, 0
    device = next(model.parameters()).device
    with torch.no_grad():
        for x, label in batches:
            total += float(nn.functional.cross_entropy(model(x.to(device)).float(), label.to(device), reduction="sum"))
            count += len(label)
    return total / count


@dataclass
class Trial:
    """A copy of the model to try schemes on: its weights are masked and put back, its batch statistics re-estimated."""

    problem: Problem
    model: nn.Module
    evidence: Evidence

    @cached_property
    def copied(self) -> nn.Module:
        """The dense model in eval mode, ours to change."""
        return throw_away_copy(self.model, None).eval()

    @cached_property
    def dense(self) -> dict[int, Tensor]:
        """The dense weights of the sites with a choice."""
        sites = self.problem.sites.sites
        return {i: weight_of(self.copied, sites[i]).detach().clone() for i in self.problem.free}

    @torch.no_grad()
    def loss(self, choice: dict[int, Pattern] | Sequence[int]) -> float:
        """Loss on the held-back half with these patterns (by site index, absent is dense), after BN recalibration."""
        if not isinstance(choice, dict):
            choice = {i: self.problem.options[i][choice[i]] for i in self.problem.free}
        for i, weight in self.dense.items():
            pattern, parameter = choice.get(i, Pattern.DENSE), weight_of(self.copied, self.problem.sites.sites[i])
            if pattern.is_dense:
                parameter.copy_(weight)
            else:
                mask = make_mask(weight, pattern.n, self.problem.grouping(i, pattern))
                torch.mul(weight, mask, out=parameter.data)
        recalibrate_bn(self.copied, self.evidence.shown)
        return loss_on(self.copied, self.evidence.held_back)
