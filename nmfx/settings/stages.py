"""What each stage of a job can be told: the network, pictures, training under the scheme, what is exported and evaluated.

A few lines over 300, so that the options of all stages are in one place.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from nmfx.errors import NmfxError
from nmfx.settings.engines import ENGINES
from nmfx.settings.formats import FORMATS, with_formats
from nmfx.settings.option import check_options, inline, option
from nmfx.settings.platforms import PLATFORMS
from nmfx.settings.training import Augment, Settings
from nmfx.sparsity.rules import RULES
from nmfx.sparsity.score import SCORES
from nmfx.text import nearest

if TYPE_CHECKING:
    Training = str
    Ranking = str
    Where = str
else:  # the words that flags and keys may say
    Training, Ranking, Where = Literal[tuple(RULES)], Literal[tuple(SCORES)], Literal[tuple(PLATFORMS)]
FOLDER = "folder"  # the name of the data that is just an image folder: the root
LARGEST_PICTURE = 1 << 26  # numbers in one input that a file may ask for: 256 MiB


@dataclass(frozen=True)
class ModelSettings:
    """The network. From a compressed checkpoint the search goes on to a sparser scheme, and gives no site a denser pattern."""

    name: str = option(help="of torchvision, timm or the demos; prefixes torchvision: and timm: say which", flag=None)
    weights: str = option(
        "auto",
        "auto: pretrained, or random where they cannot be had; none: random; FILE: safetensors or .pth, or a compressed "
        "checkpoint of nmfx, to search a sparser scheme from",
        metavar="auto|pretrained|none|FILE",
    )
    kwargs: Mapping[str, Any] = option((), "what its builder takes, such as num_classes and in_chans", flag=None)
    input_size: str = option("", "input without the batch, as in 3x224x224; the model's own when empty", metavar="CxHxW")
    weights_entry: str = option(
        "",
        "which weights of a training checkpoint, as state_dict or state_dict_ema; averaged ones first",
        metavar="NAME",
    )
    classes: int | None = option(
        None, "classes of a model given by name, where not its own number", least=1, most=1_000_000, metavar="N"
    )

    def __post_init__(self) -> None:
        check_options(self, "model")
        parse_size(self.input_size, "input_size")
        classes = {} if self.classes is None else {"num_classes": self.classes}
        object.__setattr__(self, "kwargs", {**dict(self.kwargs), **classes})
        object.__setattr__(self, "classes", None)  # another word for the same, so that both are one

    @property
    def size(self) -> tuple[int, ...] | None:
        """``input_size`` as numbers."""
        return parse_size(self.input_size, "input_size")


@dataclass(frozen=True)
class DataSettings:
    """The pictures; `name` is that of `nmfx.open_data`, or ``folder``: the image folder that `root` is."""

    name: str = option(
        help="an image folder, digits, fashion-mnist, or a timm data set such as torch/cifar100",
        flag="data",
        metavar="DIR|NAME",
    )
    root: str = option("", "where a named data set is kept", flag="data-root", metavar="DIR")
    train_split: str = option("train", "the split to train on", flag=None)
    val_split: str = option("validation", "the split to evaluate on", flag=None)
    held_back: float = option(0.1, "share held back for validation, of data without such a split", flag=None, least=0, most=1)
    download: bool = option(False, "fetch a data set of timm or torchvision that is not there", flag=None)
    workers: int = option(0, "processes that read pictures", least=0, most=256, free=True)

    def __post_init__(self) -> None:
        check_options(self, "data")

    @property
    def identity(self) -> dict[str, Any]:
        """What decides which pictures there are: a data set with a name may move, a folder is named by its place."""
        place = {"data": self.root or FOLDER} if self.name == FOLDER else {"data": self.name}
        return place | {name: getattr(self, name) for name in ("train_split", "val_split", "held_back")}

    @property
    def flags(self) -> tuple[str, ...]:
        """What says the same pictures to another command."""
        return ("--data", self.name, *(("--data-root", self.root) if self.root else ()))


@dataclass(frozen=True)
class RecalibrateSettings:
    """How batch norms are matched to the dense network's."""

    pictures: int | None = option(None, "training pictures to look at; 512, or all", least=1)
    batch_size: int = option(64, "pictures a batch, of all processes together", least=1)
    seed: int = option(0, "which pictures", least=0, most=2**32 - 1)

    def __post_init__(self) -> None:
        check_options(self, "recalibration settings")


@dataclass(frozen=True)
class CorrectSettings:
    """How kept weights are corrected against the dense network."""

    method: Literal["admm", "sweep", "magnitude"] = option(
        "admm", "ADMM between loss and mask (ALPS), one sweep over the columns (SparseGPT), or the mask of magnitude, refitted"
    )
    pictures: int | None = option(None, "training pictures to look at, without their labels; 512, or all", least=1)
    batch_size: int = option(32, "pictures a batch", least=1)
    memory: float = option(
        1.5, "GiB of activations to hold at once; pictures that do not fit take part from later layers on", least=0, above=True
    )
    seed: int = option(0, "which pictures, and which positions of large feature maps", least=0, most=2**32 - 1)

    def __post_init__(self) -> None:
        check_options(self, "correction settings")


@dataclass(frozen=True)
class FinetuneSettings:
    """Training under the scheme."""

    weights: Literal["model", "none"] = option("model", "none: start from random weights")
    training: Training = option(
        "sr-ste", "masks follow the weights with a pull on dropped ones or without, or stay as they are (ASP)"
    )
    score: Ranking = option(
        "magnitude", "what masks rank the weights of a group by, measured on the dense weights before training"
    )
    decay: float = option(RULES["sr-ste"].decay, "sr-ste: lambda, the pull on dropped weights", least=0, most=1e6)
    pictures: int | None = option(None, "training pictures to use; all, or at most 512 with --distill-only", least=8)
    minutes: float | None = option(
        None, "as many epochs as fit in so many minutes, timed at the start, instead of --epochs", least=0, above=True, most=1e5
    )
    settings: Settings = inline(Settings(), "workers")  # the data settings have them

    def __post_init__(self) -> None:
        check_options(self, "fine-tuning settings")

    def check_given(self, given: Collection[str]) -> None:
        """Refuse keys that were given beside others, and would say nothing there."""
        if "minutes" in given and "epochs" in given:
            raise NmfxError("`minutes` says how many epochs; leave `epochs` out")
        alone = ("weights", "distill", "smoothing")
        if self.settings.distill_only and (extra := next((key for key in alone if key in given), None)):
            raise NmfxError(f"`{extra}` says nothing beside `distill_only`")

    @staticmethod
    def base(said: Mapping[str, Any]) -> FinetuneSettings | None:
        """What options have that are not among those `said`, where that is not the default."""
        if str(said.get("distill_only", "")).lower() != "true":
            return None
        return replace(DISTILLATION, minutes=None) if "epochs" in said else DISTILLATION


# Measured on ResNet-20 and EfficientNet-Lite0, docs/correction.md. Mixed pictures are new questions to the dense network.
DISTILLATION = FinetuneSettings(
    training="fixed",
    minutes=10.0,
    settings=Settings(
        batch_size=64,
        lr=0.001,
        opt="adamw",
        weight_decay=0.01,
        temperature=2.0,
        distill_only=True,
        freeze_bn=True,
        augment=Augment(mixup=1.0, cutmix=1.0),
    ),
)


@dataclass(frozen=True)
@with_formats
class ExportSettings:
    """What is written beside the scheme and the compressed checkpoint, of the best or the last epoch of fine-tuning."""

    epoch: Literal["best", "last"] = option("best", "of fine-tuning: that of the highest top-1, or the last")
    platform: Where | None = option(
        None,
        "where the network is to run: also the format that is taken there, and what of it will run sparse (docs/platforms.md)",
        flag="for",
    )
    folder: bool = option(
        False, "also a folder hub/ as model hubs expect it: plain weights, timm's config.json, the scheme, a model card"
    )
    batch: int = option(
        1,
        "pictures at a time that the compiled model is for: 1 takes one alone, others 2 or more",
        least=1,
        most=4096,
        metavar="B",
    )
    opset: int | None = option(None, "of the ONNX file: version of its operators; the exporter's own", least=7, most=99)
    free_size: bool = option(False, "of the ONNX file: height and width are free too, where the model does not fix them")

    def __post_init__(self) -> None:
        check_options(self, "export settings")
        if self.platform is not None and self.platform not in PLATFORMS:
            near = nearest(self.platform, PLATFORMS)
            raise NmfxError(f"unknown platform {self.platform!r}{near}; known: {', '.join(PLATFORMS)}")

    def check_given(self, given: Collection[str]) -> None:
        """Refuse an option of a format that is not asked for."""
        for name, one in FORMATS.items():
            if name not in self.formats and (extra := next((key for key in one.takes if key in given), None)):
                raise NmfxError(f"`{extra}` says nothing without `{name}`")

    @property
    def formats(self) -> list[str]:
        """Those of `FORMATS` that are asked for, or taken by the platform."""
        taken = None if self.platform is None else PLATFORMS[self.platform].format
        return [name for name in FORMATS if getattr(self, name) or name == taken]


@dataclass(frozen=True)
class PrecisionSettings:
    """The numbers that a compiled model computes with."""

    precision: Literal["float32", "int8"] = option("float32", "what nmfx.compile computes in; int8 looks at pictures of --data")
    calibrate: int = option(256, "pictures that int8 chooses its ranges by, without their labels", least=1, most=100_000)

    def __post_init__(self) -> None:
        check_options(self, "precision")


@dataclass(frozen=True)
class CompressSettings:
    """From a trained network to a sparse one without labels: what the stages of `nmfx compress` are told."""

    target: str = option("0.75", "sparsity of the weights, as 0.75, or times fewer, as 4x")
    minutes: float = option(10.0, "of distillation, after what takes no training; 0: none", least=0, most=1e5)
    pictures: int | None = option(None, "training pictures to look at, without their labels; 512, or all", least=16)

    def __post_init__(self) -> None:
        check_options(self, "compression settings")


@dataclass(frozen=True)
class EvaluateSettings:
    """How checkpoints are evaluated."""

    batch_size: int = option(256, "pictures a batch, of all processes together", least=1)

    def __post_init__(self) -> None:
        check_options(self, "evaluation settings")


@dataclass(frozen=True)
class BenchSettings:
    """How a network is timed. A model by name is timed under a scheme that is searched first."""

    target: str = option("0.875", "for a model by name: sparsity of parameters")
    m: int = option(16, "for a model by name: group size M", least=2, most=64)
    batch: str = option("1,8", "batch sizes", metavar="B,B,...")
    threads: str = option("", "numbers of threads; 1 and all", metavar="T,T,...")
    turns: int = option(15, "turns of every engine", least=1, most=100_000)
    engines: str = option(
        "", f"dense engines beside PyTorch: {', '.join(ENGINES)}, or none; those installed", metavar="E,E,..."
    )
    tune: Literal["quick", "full"] = option("quick", "how nmfx chooses: by short turns of few ways, or by long ones of all")

    def __post_init__(self) -> None:
        check_options(self, "bench settings")
        _ = self.batches, self.thread_counts, self.engine_names

    @property
    def batches(self) -> tuple[int, ...]:
        """``batch`` as numbers."""
        return _numbers(self.batch, "batch")

    @property
    def thread_counts(self) -> tuple[int, ...]:
        """``threads`` as numbers; none: 1 and all."""
        return _numbers(self.threads, "threads") if self.threads else ()

    @property
    def engine_names(self) -> tuple[str, ...]:
        """``engines`` as names; none: those that are installed."""
        if not self.engines:
            return tuple(name for name, engine in ENGINES.items() if engine.is_installed)
        if self.engines == "none":
            return ()
        names = tuple(dict.fromkeys(self.engines.split(",")))
        for name in names:
            if name not in ENGINES:
                raise NmfxError(f"engines {self.engines}: expected names of {', '.join(ENGINES)} with commas, or none")
        return names


def _numbers(listed: str, key: str) -> tuple[int, ...]:
    parts = listed.split(",")
    if not all(part.isascii() and part.isdigit() and len(part) < 5 and int(part) for part in parts):
        raise NmfxError(f"{key} {listed}: expected whole numbers below 10,000 with commas, as in 1,8")
    return tuple(dict.fromkeys(map(int, parts)))


def parse_size(size: str, what: str) -> tuple[int, ...] | None:
    """``3x224x224`` as numbers; one number means a square colour picture, nothing None.

    Raises:
        NmfxError: anything else, or a picture of more than 256 MiB.
    """
    if not size:
        return None
    parts = size.lower().replace(",", "x").split("x")
    if all(re.fullmatch(r"0*[1-9][0-9]{0,5}", part) for part in parts) and len(parts) <= 5:
        numbers = tuple(map(int, parts))
        numbers = (3, *numbers, *numbers) if len(numbers) == 1 else numbers
        if math.prod(numbers) <= LARGEST_PICTURE:
            return numbers
    raise NmfxError(f"{what} {size[:40]}: expected the input without its batch, as in 3x224x224")
