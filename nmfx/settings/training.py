"""How a network is fine-tuned: the published settings, and what may be chosen instead."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from nmfx.errors import NmfxError
from nmfx.settings.option import check_options, free_keys, option

FULL_RATE = 1000  # updates of a distillation from which on its learning rate is the whole one


@dataclass(frozen=True)
class Augment:
    """What training does to pictures, in timm's words; None is the usual choice for the data at hand."""

    on: bool = option(True, "crops, mirroring and jitter; without them, all of it but mixup is left out", flag="no-augment")
    hflip: float | None = option(None, "share of mirrored pictures; usually 0.5, and 0 for digits", flag=None, least=0, most=1)
    color_jitter: float | None = option(None, "for pictures read from files; usually 0.4", flag=None, least=0)
    auto_augment: str | None = option(None, "a policy of timm, as rand-m9; for pictures read from files", flag=None)
    scale: tuple[float, float] | None = option(None, "least and largest share of the area in a crop; for files", flag=None)
    ratio: tuple[float, float] | None = option(None, "least and largest ratio of a crop's sides; for files", flag=None)
    interpolation: str | None = option(None, "how pictures are resized, in timm's words; for files", flag=None)
    padding: int | None = option(
        None, "for sets in memory: crops out of so many black pixels on every side; usually 4, digits 1", flag=None, least=0
    )
    re_prob: float = option(0.0, "share of pictures with an erased rectangle", flag=None, least=0, most=1)
    mixup: float = option(0.0, "mix pairs of pictures; labels become shares", least=0, metavar="ALPHA")
    cutmix: float = option(0.0, "paste parts of other pictures; labels become shares", least=0, metavar="ALPHA")
    mixup_prob: float = option(1.0, "share of batches that are mixed", flag=None, least=0, most=1)
    label_smoothing: float = option(0.0, "of mixed labels; `smoothing` is that of all", flag=None, least=0, most=1, below=True)

    def __post_init__(self) -> None:
        check_options(self, "augmentation")


@dataclass(frozen=True)
class Settings:
    """Everything that decides which weights come out; the defaults are DominoSearch's ResNet-50 recipe (domino.md, 8).

    ``weight_decay`` acts on dropped weights as well: with SR-STE they shrink by ``lr * (weight_decay + decay)`` an update, so
    that one has to grow to come back. ``clip_grad`` is of the gradient of the loss: SR-STE's pull comes after it, at its stated
    size, as weight decay does. The loss is ``(1 - distill) * loss + distill * T^2 * KL(teacher / T, model / T)``, T being the
    ``temperature``; with ``distill_only`` it is the last part alone. ``fsdp`` shares weights, gradients, optimiser state and
    moving average out (`fully_shard`), gathers a block while it computes, and does not lay weights out anew. The schedule moves
    at every update; evaluation is in full precision.

    Raises:
        NmfxError: a value of another type or out of its limits, or two that do not go together.
    """

    epochs: int = option(120, "passes over the training pictures", least=1, most=1_000_000)
    batch_size: int = option(256, "pictures an update, of all processes and accumulated passes together", least=1)
    lr: float = option(0.01, "highest learning rate", least=0, above=True)
    momentum: float = option(0.9, "of SGD", least=0, most=1, below=True)
    weight_decay: float = option(5e-5, "on weights of two or more dimensions, not on norms and biases", least=0)
    warmup_epochs: float | None = option(
        None, "of linear growth from a thousandth of the learning rate; a 24th of the epochs, 5 of 120", least=0
    )
    opt: str = option("momentum", "an optimiser of timm; momentum is SGD without Nesterov's look ahead")
    sched: str = option("cosine", "a schedule of timm")
    smoothing: float = option(0.0, "label smoothing, of mixed labels too", least=0, most=1, below=True)
    amp: Literal["none", "bf16"] = option("none", "bf16: compute in bfloat16 where it is safe; weights, masks, loss stay")
    channels_last: bool = option(False, "lay pictures and weights out with channels last")
    accumulate: int = option(1, "cut each batch into so many passes", least=1, metavar="K")
    compile: str = option("", "compile by torch.compile, with this backend", const="inductor", metavar="BACKEND")
    parallel: Literal["ddp", "fsdp"] = option(
        "ddp", "fsdp: share weights and optimiser state out over torchrun's processes", flag="fsdp", const="fsdp"
    )
    ema: float = option(
        0.0, "decay of a moving average of the weights, which is then kept", least=0, most=1, below=True, metavar="DECAY"
    )
    clip_grad: float = option(0.0, "largest norm of the gradient, before SR-STE's pull; 0: none", least=0, metavar="NORM")
    distill: float = option(0.0, "share of the dense model's answers in the loss", least=0, most=1, metavar="SHARE")
    temperature: float = option(1.0, "softens both answers for distill", least=0, above=True)
    distill_only: bool = option(
        False,
        "no labels: learn from the dense model's answers alone, from corrected weights if there are any, and keep what is "
        "nearer to them on held-back training pictures; by itself 10 minutes on 512 pictures, see docs/correction.md",
    )
    freeze_bn: bool = option(False, "batch norms keep their statistics, as for few pictures")
    seed: int = option(0, "of the order of pictures, their augmentation, dropout", least=0, most=2**32 - 1)
    augment: Augment = option(Augment(), "what is done to pictures")
    workers: int = option(0, "processes that read pictures", least=0, most=256, free=True)
    save_seconds: float = option(180.0, "time between saves within an epoch", least=0, free=True)
    tensorboard: bool = option(False, "also log for TensorBoard", free=True)

    def __post_init__(self) -> None:
        check_options(self, "fine-tuning settings")
        if (self.warmup_epochs or 0) >= self.epochs:
            raise NmfxError(
                f"fine-tuning settings: warmup_epochs={self.warmup_epochs}: expected fewer than epochs={self.epochs}"
            )
        if self.compile and self.parallel == "fsdp":
            raise NmfxError("fine-tuning settings: expected compile without fsdp (they do not go together)")

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

    def at_rate_of(self, pictures: int) -> Settings:
        """For a distillation over so many pictures: below 1,000 updates the learning rate falls with the root of their number,
        as the noise of fewer ones does not average out (docs/correction.md).
        """
        updates = self.epochs * max(1, pictures // self.batch_size)
        return replace(self, lr=self.lr * min(1.0, (updates / FULL_RATE) ** 0.5))

    def identity(self) -> dict[str, Any]:
        """What has to agree for a run to be resumed."""
        return {name: value for name, value in asdict(self).items() if name not in free_keys(Settings)}
