"""evaluate: top-1, top-5 and loss of any classifier, converted or plain."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from timm.utils import AverageMeter, accuracy
from torch import Tensor, nn

from nmfx.graph.modes import keep_modes


@dataclass(frozen=True)
class Evaluation:
    """Shares of right answers in 0..1, mean cross-entropy, and the number of pictures."""

    top1: float
    top5: float
    loss: float
    samples: int


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Evaluation:
    """Accuracy of `model` in eval mode over ``(input, label)`` batches; the modules' modes are restored."""
    device = next(model.parameters()).device
    top1, top5, loss = AverageMeter(), AverageMeter(), AverageMeter()
    with keep_modes(model):
        model.eval()
        for x, label in batches:
            x, label = x.to(device), label.to(device)
            logits = model(x).float()
            first, fifth = accuracy(logits, label, topk=(1, min(5, logits.shape[1])))
            top1.update(first.item() / 100, len(x))
            top5.update(fifth.item() / 100, len(x))
            loss.update(nn.functional.cross_entropy(logits, label).item(), len(x))
    return Evaluation(top1.avg, top5.avg, loss.avg, int(top1.count))
