"""What the header of a compiled file says: values of msgspec, none of which can hold code.

The file is one of `nmfx.files.sealed`: tensors by name, and this as JSON under one SHA-256 with them. The graph is the plain
one, operator by operator; chains are made anew when it is loaded, for the kernel and the threads that are there.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import msgspec
import torch
from msgspec import Meta

from nmfx.files.parsing import Count, Form, Size
from nmfx.runtime.checks import LONGEST
from nmfx.runtime.measuring.choices import Choice
from nmfx.runtime.saved.machine import Machine

VERSION, KIND = 1, "compiled"
MOST_NODES = 1 << 16
MOST_NUMBERS = 1 << 40  # of a tensor
_NAMES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _NAMES}
# Arguments of operators that are neither numbers nor text, by their kind in a schema.
ENUMERATIONS: dict[str, dict[str, Any]] = {
    "ScalarType": DTYPES,
    "Layout": {"strided": torch.strided},
    "Device": {"cpu": torch.device("cpu")},
    "MemoryFormat": {
        "contiguous": torch.contiguous_format,
        "channels last": torch.channels_last,
        "channels last 3d": torch.channels_last_3d,
        "preserve": torch.preserve_format,
    },
}

Name = Annotated[str, Meta(min_length=1, max_length=1024)]  # of a tensor, a weight
Word = Annotated[str, Meta(max_length=256)]
Whole = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
Real = Annotated[float, Meta(ge=-1.7976931348623157e308, le=1.7976931348623157e308)]
Dim = Annotated[int, Meta(ge=-64, le=LONGEST)]
Shape = Annotated[tuple[Dim, ...], Meta(max_length=8)]


class Node(Form, frozen=True, tag_field="is", tag="node"):
    """What an earlier node gives, by its number."""

    of: Count


class NotFinite(Form, frozen=True, tag_field="is", tag="number"):
    """A float that JSON cannot say."""

    of: Literal["inf", "-inf", "nan"]


class Enumerated(Form, frozen=True, tag_field="is", tag="enumerated"):
    """A dtype, layout, device or memory format (`ENUMERATIONS`)."""

    kind: Literal[tuple(ENUMERATIONS)]  # type: ignore[valid-type]
    of: Word


Scalar = Node | NotFinite | Enumerated | bool | Whole | Real | Word | None
Argument = Scalar | Annotated[list[Scalar], Meta(max_length=MOST_NODES)]
Limit = Real | NotFinite
Sides = Annotated[tuple[Count, ...], Meta(min_length=2, max_length=4)]  # check_window says how many


class Given(Form, frozen=True, tag_field="is", tag="input"):
    """The pictures."""

    shape: Shape | None = None


class Constant(Form, frozen=True, tag_field="is", tag="tensor"):
    """A tensor of the file."""

    name: Name


class Call(Form, frozen=True, omit_defaults=True, tag_field="is", tag="call"):
    """An operator (`nmfx.runtime.saved.allowed`) of its arguments.

    Attributes:
        shape: of the result, if that is a tensor; negative numbers stand for sizes that hang on the batch, -1 for the batch
            itself.
    """

    operator: Word
    args: list[Argument]
    kwargs: dict[Word, Argument] = msgspec.field(default_factory=dict)
    shape: Shape | None = None


class Site(Form, frozen=True, omit_defaults=True, tag_field="is", tag="site"):
    """A layer, by its number, of what one or two nodes give."""

    layer: Count
    inputs: Annotated[tuple[Node, ...], Meta(min_length=1, max_length=2)]
    shape: Shape | None = None


class KernelSite(Form, frozen=True, tag_field="is", tag="kernel"):
    """A `KernelLayer`: its arguments by name, and whether and how it works on lanes."""

    operator: Word
    tensors: dict[Word, Name | None]
    options: dict[Word, Argument]
    lanes: bool | tuple[Count, Count, bool] | None  # chunk, vectors, zeros: of the tile by lanes


class DenseSite(Form, frozen=True, tag_field="is", tag="dense"):
    """A `DenseConv2d`, or a `DenseLinear`, which has no geometry."""

    weight: Name
    bias: Name | None
    low: Limit
    high: Limit
    geometry: tuple[Sides, Sides, Sides] | None = None
    groups: Size = 1
    channels_last: bool = False


class Several(Form, frozen=True, tag_field="is", tag="several"):
    """Outputs that a model gives together; `keys` of a dict."""

    kind: Literal["tuple", "list", "dict", "OrderedDict"]
    items: list[Node | Several | None]
    keys: list[Word] | None = None


class Inputs(Form, frozen=True):
    """What the graph is for: a `Domain`, its batches as spans from the least to the largest of each."""

    shape: Annotated[tuple[Size, ...], Meta(min_length=1, max_length=8)]
    dtype: Literal[_NAMES]  # type: ignore[valid-type]
    batches: Annotated[list[tuple[Count, Count]], Meta(min_length=1, max_length=4096)]
    apart: bool

    def __post_init__(self) -> None:  # msgspec makes an error that names the place of a ValueError
        if math.prod(self.shape) > MOST_NUMBERS:
            raise ValueError(f"shape {self.shape} is too large")


class Compiled(Form, frozen=True):
    """The header.

    Attributes:
        orders: of the tensors whose dimensions do not lie in memory in their order: dimensions, the outermost first.
        batch, images: see `Lowered`.
    """

    version: int
    kind: Literal["compiled"]
    inputs: Inputs
    batch: Size
    images: Count
    choices: list[Choice]
    machine: Machine
    orders: dict[Name, Annotated[tuple[Count, ...], Meta(max_length=8)]]
    layers: Annotated[list[KernelSite | DenseSite], Meta(max_length=MOST_NODES)]
    nodes: Annotated[list[Given | Constant | Call | Site], Meta(max_length=MOST_NODES)]
    outputs: Node | Several | None
