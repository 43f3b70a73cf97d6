"""What training minimises: cross-entropy of whatever a classifier returns, auxiliary heads and a teacher included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F

from nmfx.errors import NmfxError
from nmfx.settings.training import Settings

# torchvision's two networks with auxiliary heads, and what their papers give each head.
AUXILIARY = {"GoogLeNetOutputs": 0.3, "InceptionOutputs": 0.4}


def logits_of(outputs: Any) -> Tensor:
    """The first output of a model, in full precision, ``(batch, classes)``; heads that come after it only help to train."""
    several = outputs.values() if isinstance(outputs, Mapping) else outputs
    logits: Tensor = (outputs if isinstance(outputs, Tensor) else next(iter(several))).float()
    return logits


def task_loss(outputs: Any, label: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with labels ``(batch,)`` or shares ``(batch, classes)`` (mixup), smoothed ones before mixing."""
    criterion: nn.Module = LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()
    if label.dim() == 2:
        criterion = SoftTargetCrossEntropy()
    loss: Tensor = criterion(logits_of(outputs), label)
    if weight := AUXILIARY.get(type(outputs).__name__):
        heads = [head for head in outputs[1:] if head is not None]
        loss = loss + weight * sum(criterion(head.float(), label) for head in heads)
    return loss


def distilled(loss: Tensor, outputs: Any, teacher: Tensor, settings: Settings) -> Tensor:
    """`loss` and the divergence from the teacher's answers, softened alike (Hinton et al., 2015), by their weights.

    Raises:
        NmfxError: the teacher has other classes.
    """
    logits, soft = logits_of(outputs), settings.temperature
    if logits.shape != teacher.shape:
        raise NmfxError(f"distillation: the teacher gives {tuple(teacher.shape)}, the model {tuple(logits.shape)}")
    target, own = (F.log_softmax(x / soft, dim=1) for x in (teacher, logits))
    divergence = F.kl_div(own, target, reduction="batchmean", log_target=True) * soft**2
    return divergence if settings.distill_only else torch.lerp(loss, divergence, settings.distill)
