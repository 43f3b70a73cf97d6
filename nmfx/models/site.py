"""Sites: the weights of a model that can take a pattern, found by use, and what was left out with the reason."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from nmfx.errors import SchemeError
from nmfx.sparsity.layout import Grouping, Outputs, Rows, group
from nmfx.sparsity.pattern import Layout, Pattern

# Projections that are stacked in one weight, in equal parts, by the name of the module or attribute: nn.MultiheadAttention,
# timm, Hugging Face. A wrong guess costs nothing but a few vectors that are not full.
STACKED = {re.compile(r"qkv|in_proj|c_attn", re.I): 3, re.compile(r"kv|qk", re.I): 2}


@dataclass(frozen=True)
class Site:
    """One weight that a convolution, a linear or a matmul reads as its weight.

    Attributes:
        name: state-dict key.
        kind: the operation that reads it: ``conv2d``, ``conv_transpose2d``, ``linear``, ``matmul``, ``bilinear``, ...
        shape: shape of the parameter.
        rows: ``(outer, length, inner)``; groups run along the ``length`` input channels (see `Grouping`).
        macs: multiply-adds per sample, one multiply-add is one MAC, summed over all calls in eval mode.
        calls: how often one forward reads it as a weight.
        bytes: size of the dense weight.
        owners: ``(module path, attribute)`` of every module that holds the parameter; several when it is tied.
        conv_groups: groups of the convolution that reads it (1 for everything else).
        train_only: read in train mode only (auxiliary heads).
        derived: its module makes another weight of it in its own forward pass (standardisation); that one is masked.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    rows: Rows
    macs: int
    calls: int
    bytes: int
    owners: tuple[tuple[str, str], ...]
    conv_groups: int = 1
    train_only: bool = False
    derived: bool = False

    @property
    def weights(self) -> int:
        """Number of weights, kept or not."""
        return math.prod(self.shape)

    @property
    def length(self) -> int:
        """Length of the group axis: input channels of one convolution group, or input features."""
        return self.rows[1]

    @property
    def outputs(self) -> Outputs:
        """``(run, step)``: how many adjacent outputs may share a mask, and how far apart in memory their weights are.

        A run is what one group of a convolution gives, one matrix of a stack, or one of q, k and v that are stacked.
        """
        (outer, length, inner), axis = self.rows, self.axis
        if "transpose" in self.kind:  # (in, out of a group, *kernel)
            whole = run = self.shape[1]
            step = inner // run
        elif self.kind.startswith("conv") and axis in (1, None):  # (out, in of a group, *kernel)
            whole, step = outer // self.conv_groups, length * inner
            run = whole
        elif inner == 1:  # (..., out, in)
            whole, step = outer, length
            run = self.shape[axis - 1] if axis else outer
        else:  # (in, out, ...)
            whole, step = inner, 1
            run = next((size for size in reversed(self.shape[axis + 1 :]) if size > 1), inner) if axis is not None else inner
        module = ".".join(self.name.split(".")[-2:])
        parts = next((parts for said, parts in STACKED.items() if said.search(module)), 1)
        found = (run // parts if run == whole and run % parts == 0 else run), step
        return found if Grouping(self.rows, 1, outputs=found).fits else (max(1, outer), length * inner)

    def grouping(self, pattern: Pattern, layout: Layout = "strict", *, short: bool = False) -> Grouping:
        """Its groups under `pattern` (see `group`)."""
        return group(self.name, self.rows, pattern, layout, short=short, outputs=self.outputs)

    @property
    def axis(self) -> int | None:
        """Index of the group axis in `shape`; None when it is part of a flattened dimension."""
        for index, size in enumerate(self.shape):
            if size == self.length and math.prod(self.shape[index + 1 :]) == self.rows[2]:
                return index
        return None


def weight_of(model: nn.Module, site: Site) -> nn.Parameter:
    """The dense parameter of a site, behind its mask if it has one."""
    path, attr = site.owners[0]
    parameter = model.get_submodule(path)._parameters[attr]
    assert parameter is not None
    return parameter


@dataclass(frozen=True)
class Skipped:
    """A parameter (or a buffer that serves as a weight) with two or more dimensions that is not a site, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str

    @property
    def weights(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Sites:
    """All sites of a model in module order; ``sites["layer1.0.conv1.weight"]``, iteration and ``len`` work as expected."""

    sites: tuple[Site, ...]
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()
    model: str = ""
    _index: dict[str, Site] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._index.update({site.name: site for site in self.sites})

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __contains__(self, name: object) -> bool:
        return name in self._index

    def __getitem__(self, name: str) -> Site:
        """The site called `name`.

        Raises:
            SchemeError: there is none; says why when the parameter was skipped.
        """
        if name in self._index:
            return self._index[name]
        reason = next((f"skipped: {s.reason}" for s in self.skipped if s.name == name), "the model has no such weight")
        raise SchemeError(f"{name}: not a site ({reason}); `nmfx inspect MODEL` lists the sites")

    @property
    def weights(self) -> int:
        """Weights of all sites."""
        return sum(site.weights for site in self)

    @property
    def macs(self) -> int:
        """MACs per sample of all sites."""
        return sum(site.macs for site in self)

    @property
    def fingerprint(self) -> str:
        """Hash of names, shapes and rows: two models with the same one take the same schemes."""
        text = "\n".join(f"{site.name} {site.shape} {site.rows}" for site in self)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
