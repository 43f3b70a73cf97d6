"""How a network is fine-tuned: the published settings, and what may be chosen instead."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from nmfx.data.augment import Augment
from nmfx.errors import NmfxError

INFINITE = float("inf")
FREE = ("workers", "save_seconds", "tensorboard")  # they change no weight: a run may be resumed with others


@dataclass(frozen=True)
class Settings:
    """Everything that decides which weights come out; the defaults are DominoSearch's ResNet-50 recipe (domino.md, 8).

    Attributes:
        batch_size: pictures an update, of all processes and accumulated passes together: the same run on more of them.
        weight_decay: on weights of two or more dimensions, not on norms and biases. It acts on dropped weights as well: with
            SR-STE they shrink by ``lr * (weight_decay + decay)`` an update, so that one has to grow to come back.
        warmup_epochs: linear, from a thousandth of `lr`; None is a 24th of the epochs, 5 of 120.
        opt, sched: names of timm; ``momentum`` is SGD without Nesterov's look ahead. The schedule moves at every update.
        smoothing: label smoothing, of mixed labels too.
        amp: ``bf16`` computes under autocast; weights, masks, loss and evaluation stay in full precision.
        accumulate: passes an update; each adds its share of the gradient.
        compile: a backend of torch.compile, as ``inductor``.
        ema: decay of a moving average of the dense weights (timm's ModelEmaV3, warmed up); the average is then what is
            evaluated, kept as the best, and left in the model.
        clip_grad: largest norm of the gradient of the loss. SR-STE's pull comes after it, at its stated size, as weight decay
            does.
        distill, temperature: ``(1 - distill) * loss + distill * T^2 * KL(teacher / T, model / T)``.
        parallel: under several processes, ``ddp`` keeps all weights in each; ``fsdp`` shares weights, gradients, optimiser
            state and moving average out (`fully_shard`), gathers a block while it computes, and does not lay weights out anew.
        save_seconds: time between two saves within an epoch.
    """

    epochs: int = 120
    batch_size: int = 256
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-5
    warmup_epochs: float | None = None
    opt: str = "momentum"
    sched: str = "cosine"
    smoothing: float = 0.0
    amp: Literal["none", "bf16"] = "none"
    channels_last: bool = False
    accumulate: int = 1
    compile: str = ""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    ema: float = 0.0
    clip_grad: float = 0.0
    distill: float = 0.0
    temperature: float = 1.0
    seed: int = 0
    augment: Augment = field(default_factory=Augment)
    workers: int = 0
    save_seconds: float = 180.0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name, kind in KINDS.items():
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not (whole or (kind is float and isinstance(value, float)) or (name == "warmup_epochs" and value is None)):
                what = "a whole number" if kind is int else "a number"
                raise NmfxError(f"fine-tuning settings: {name}={value!r}: expected {what}")
        warmup = 0 if self.warmup_epochs is None else self.warmup_epochs
        limits = {
            "epochs of 1 or more": self.epochs >= 1,
            "a batch_size of 1 or more": self.batch_size >= 1,
            "a positive, finite lr": 0 < self.lr < INFINITE,
            "momentum in 0..1": 0 <= self.momentum < 1,
            "a finite weight_decay of 0 or more": 0 <= self.weight_decay < INFINITE,
            "warmup_epochs below epochs": 0 <= warmup < self.epochs,
            "smoothing in 0..1": 0 <= self.smoothing < 1,
            "amp none or bf16": self.amp in ("none", "bf16"),
            "accumulate of 1 or more": self.accumulate >= 1,
            "parallel ddp or fsdp": self.parallel in ("ddp", "fsdp"),
            "compile without fsdp (they do not go together)": not (self.compile and self.parallel == "fsdp"),
            "ema in 0..1": 0 <= self.ema < 1,
            "clip_grad of 0 or more": self.clip_grad >= 0,
            "distill in 0..1": 0 <= self.distill <= 1,
            "a positive, finite temperature": 0 < self.temperature < INFINITE,
            "workers of 0 or more": self.workers >= 0,
            "save_seconds of 0 or more": self.save_seconds >= 0,
        }
        for expected, holds in limits.items():
            if not holds:
                raise NmfxError(f"fine-tuning settings: expected {expected}; got {self}")

    def pictures_a_pass(self, processes: int) -> int:
        """Pictures of one forward pass in one process.

        Raises:
            NmfxError: the batch does not divide by processes and passes.
        """
        parts = processes * self.accumulate
        if self.batch_size % parts:
            raise NmfxError(
                f"batch size {self.batch_size} does not divide by {processes} processes x {self.accumulate} accumulated "
                f"passes; take a multiple of {parts}"
            )
        return self.batch_size // parts

    @property
    def mixed_augment(self) -> Augment:
        """Augmentation whose mixed labels are smoothed as others are by the loss."""
        return replace(self.augment, label_smoothing=self.smoothing or self.augment.label_smoothing)

    def identity(self) -> dict[str, Any]:
        """What has to agree for a run to be resumed."""
        return {name: value for name, value in asdict(self).items() if name not in FREE}


# What a number must be, by the annotation: a whole one, or any.
KINDS = {item.name: int if item.type == "int" else float for item in fields(Settings) if str(item.type)[:3] in ("int", "flo")}
