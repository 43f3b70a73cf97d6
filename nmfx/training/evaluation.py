"""evaluate: top-1, top-5 and loss of any classifier, converted or plain."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from timm.utils import accuracy
from torch import Tensor, nn

from nmfx.errors import DataError
from nmfx.masking.modes import keep_modes
from nmfx.processes import summed
from nmfx.training.loss import logits_of


@dataclass(frozen=True)
class Evaluation:
    """Shares of right answers in 0..1, mean cross-entropy, the number of pictures, and the share of answers that a reference
    model gives too.
    """

    top1: float
    top5: float
    loss: float
    samples: int
    agreement: float | None = None


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, reference: nn.Module | None = None) -> Evaluation:
    """Accuracy of `model` in eval mode over ``(input, label)`` batches; the modules' modes are restored.

    Labels are classes ``(batch,)``, or their shares ``(batch, classes)``, of which the largest one counts as right.

    Args:
        reference: a model whose first answers are compared with, usually the dense one.

    Under torch.distributed every process calls it with batches of its own, and gets the result over all.

    Raises:
        DataError: there are no pictures.
    """
    device = next(model.parameters()).device
    sums = torch.zeros(5, dtype=torch.float64)  # right, right among five, loss, as the reference says, all
    with contextlib.ExitStack() as stack:
        for each in (model, *([] if reference is None else [reference])):
            stack.enter_context(keep_modes(each))
            each.eval()
        for x, label in batches:
            x, label = x.to(device), label.to(device)
            logits, count = logits_of(model(x)), len(x)
            right = label if label.dim() == 1 else label.argmax(1)
            first, fifth = (
                round(share.item() * count / 100) for share in accuracy(logits, right, (1, min(5, logits.shape[1])))
            )
            loss = nn.functional.cross_entropy(logits, label).item() * count
            same = 0 if reference is None else int((logits.argmax(1) == logits_of(reference(x)).argmax(1)).sum())
            sums += torch.tensor([first, fifth, loss, same, count], dtype=torch.float64)
    right, among, loss, same, count = summed(sums.to(device)).tolist()
    if not count:
        raise DataError("there are no pictures to evaluate on")
    return Evaluation(right / count, among / count, loss / count, int(count), None if reference is None else same / count)
