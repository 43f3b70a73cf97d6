"""What a recipe can say: one frozen class a section. The options of search and training are their own classes, not copies."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nmfx import text
from nmfx.errors import NmfxError
from nmfx.models.arguments import is_picture, parse_kwargs
from nmfx.search.budget import BudgetKind, parse_limit, parse_target
from nmfx.search.domino_loop import Loop
from nmfx.search.finder import METHODS
from nmfx.search.problem import Choices
from nmfx.search.sensitivity import SENSITIVITIES
from nmfx.sparsity.pattern import Pattern
from nmfx.sparsity.rules import Training
from nmfx.training.settings import Settings

FOLDER = "folder"  # the name of the data that is just an image folder: the root


INLINE = "inline"  # metadata of a field whose own keys stand in the section itself; its value: those that do not


@dataclass(frozen=True)
class ModelSection:
    """The network.

    Attributes:
        name: of torchvision, timm or the demos, as in ``nmfx convert NAME``.
        weights: ``auto``, ``pretrained``, ``none`` (random) or a file; from a compressed checkpoint the search goes on to a
            sparser scheme, and gives no site a denser pattern than it has there.
        kwargs: what its builder takes, of `nmfx.models.arguments`, such as ``num_classes`` and ``in_chans``.
        input_size: without the batch, as ``3x224x224``; the model's own when empty.
    """

    name: str
    weights: str = "auto"
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    input_size: str = ""

    def __post_init__(self) -> None:
        said = self.input_size
        if said and not (re.fullmatch(r"[1-9][0-9]{0,4}(x[1-9][0-9]{0,4}){2}", said) and is_picture(map(int, said.split("x")))):
            raise NmfxError(f"input_size {said[:40]!r}: expected channels, height and width, as in 3x224x224")
        object.__setattr__(self, "kwargs", parse_kwargs(self.kwargs, "model", NmfxError))

    @property
    def size(self) -> tuple[int, int, int] | None:
        """``input_size`` as numbers."""
        if not self.input_size:
            return None
        channels, height, width = map(int, self.input_size.split("x"))
        return channels, height, width


@dataclass(frozen=True)
class DataSection:
    """The pictures; `name` is that of `nmfx.open_data`, or ``folder``: the image folder that `root` (or --data-root) is."""

    name: str
    root: str = ""
    train_split: str = "train"
    val_split: str = "validation"
    held_back: float = 0.1
    download: bool = False
    workers: int = 0

    @property
    def identity(self) -> dict[str, Any]:
        """What decides which pictures there are: a data set with a name may move, a folder is named by its place."""
        place = {"data": self.root or FOLDER} if self.name == FOLDER else {"data": self.name}
        return place | {name: getattr(self, name) for name in ("train_split", "val_split", "held_back")}


@dataclass(frozen=True)
class SearchSection:
    """Which patterns: by a `method` under a budget, or `pattern` on every site that can take it, or the `scheme` of a file.

    Attributes:
        target, budget, limits, sensitivity: see `nmfx.find_scheme`.
        data: look at training pictures: domino runs the published loop, the others measure on a few of them.
        pictures: how many the others look at.
        seconds: time limit of spdy.
        lr, batch_size, most, seed: of the published loop (see `run_domino`).
        choices: what a site may be given.
        loop: the numbers of the published loop.
    """

    method: str = "domino"
    target: float | str = 0.875
    budget: BudgetKind = "params"
    limits: Mapping[str, float | str] | None = None
    pattern: Pattern | None = None
    scheme: str = ""
    data: bool = False
    sensitivity: str = "weight"
    pictures: int = 256
    seconds: float = 60.0
    lr: float = 0.01
    batch_size: int = 64
    most: int = 100_000
    seed: int = 0
    choices: Choices = field(default=Choices(), metadata={INLINE: ("within",)})  # it comes with the weights
    loop: Loop = field(default=Loop(), metadata={INLINE: ()})

    def __post_init__(self) -> None:
        for key, word, known in (
            ("method", self.method, tuple(METHODS)),
            ("sensitivity", self.sensitivity, ("weight", *SENSITIVITIES)),
        ):
            if word not in known:
                raise NmfxError(f"unknown {key} {word!r}{text.nearest(word, known)}; known: {', '.join(known)}")
        parse_target(self.target)
        for share in (self.limits or {}).values():
            parse_limit(share)
        if self.data and not (self.looping or self.method == "spdy" or self.sensitivity != "weight"):
            raise NmfxError(f"data: true, but {self.method} with sensitivity weight looks at no pictures; leave data out")
        if not self.data and (self.method == "spdy" or self.sensitivity != "weight"):
            which = self.method if self.method == "spdy" else f"sensitivity {self.sensitivity}"
            raise NmfxError(f"{which} looks at training pictures: say data: true")

    @property
    def looping(self) -> bool:
        """Whether it is the published loop over training batches."""
        return self.data and self.method == "domino"


@dataclass(frozen=True)
class FinetuneSection:
    """Training under the scheme.

    Attributes:
        weights: start from the ``model``'s weights, or from random ones (``none``).
        training, decay: how masks train, and SR-STE's lambda (see `nmfx.transform`).
        settings: everything else.
    """

    weights: Literal["model", "none"] = "model"
    training: Training = "sr-ste"
    decay: float = 2e-4
    settings: Settings = field(default=Settings(), metadata={INLINE: ("workers",)})  # the data section has them

    def __post_init__(self) -> None:
        if not 0 <= self.decay <= 1e6:
            raise NmfxError(f"decay {self.decay}: expected a finite factor of 0 or more, such as 2e-4")


@dataclass(frozen=True)
class ExportSection:
    """What is written beside the scheme and the compressed checkpoint, of the best or the last epoch of fine-tuning."""

    epoch: Literal["best", "last"] = "best"
    baked: bool = False
    onnx: bool = False


@dataclass(frozen=True)
class EvaluateSection:
    """How the exported checkpoint is evaluated."""

    batch_size: int = 256


@dataclass(frozen=True)
class Recipe:
    """A whole run. Without `finetune` the masked network is exported as it is; without `data` nothing is evaluated."""

    model: ModelSection
    search: SearchSection
    data: DataSection | None = None
    finetune: FinetuneSection | None = None
    export: ExportSection = ExportSection()
    evaluate: EvaluateSection = EvaluateSection()

    def __post_init__(self) -> None:
        if self.data is None and (self.finetune or self.search.data):
            raise NmfxError(f"{'finetune' if self.finetune else 'search with data: true'} needs a data section")
