"""State to go on from, on disk: one safetensors file, all that is not a tensor as JSON in its header; nothing is pickled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from nmfx.errors import CheckpointError
from nmfx.files import parsing
from nmfx.files.sealed import Tensors, find_aliases, read_sealed, write_sealed

VERSION = 1
T = TypeVar("T")


class _Header(parsing.Form, frozen=True):
    """What a state says of itself: its kind, tensors that are others under a second name, and what its owner says."""

    version: int
    kind: str
    shared: dict[str, str]
    about: dict[str, Any]


def write_state(path: Path, kind: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write a state of this kind whole or not at all, under a checksum; `about` is what JSON can say.

    Raises:
        NmfxError: it cannot be written.
    """
    shared = find_aliases(tensors)  # safetensors refuses to write a tied weight twice
    kept = {name: value.detach().cpu().contiguous() for name, value in tensors.items() if name not in shared}
    write_sealed(path, {"version": VERSION, "kind": kind, "shared": shared, "about": dict(about)}, kept)


def read_state(path: Path, kind: str, what: str, form: type[T]) -> tuple[Tensors, T]:
    """The tensors that `write_state` was given, and its `about` as a value of `form`.

    Args:
        what: what it should be, for the error.

    Raises:
        CheckpointError: no such file, altered since it was written, or of another kind.
    """
    try:
        content, tensors = read_sealed(path, what, VERSION)
        header = parsing.convert(content, _Header, str(path), CheckpointError)
        if header.kind != kind:
            raise CheckpointError("another kind of file")
        if odd := next((name for name, owner in header.shared.items() if owner not in tensors or name in tensors), None):
            raise CheckpointError(f"shared: {parsing.printable(odd)}: no tensor of its own, and none to share")
        about = parsing.convert(header.about, form, f"{path}: about", CheckpointError)
    except CheckpointError as error:
        said = str(error).removeprefix(f"{path}: ")
        raise CheckpointError(f"{path}: not {what} to resume ({said}); remove it, or give --force to start anew") from error
    return tensors | {name: tensors[owner] for name, owner in header.shared.items()}, about


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """`tensors` under ``prefix.name``."""
    return {f"{prefix}.{name}": value for name, value in tensors.items()}


def under(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """The tensors under a prefix, without it."""
    return {name.removeprefix(f"{prefix}."): value for name, value in tensors.items() if name.startswith(f"{prefix}.")}


def check_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Check that tensors of a file are those that are expected: names, shapes, and whether they hold whole numbers.

    Raises:
        CheckpointError: naming the first difference.
    """
    for name, tensor in expected.items():
        if name not in found:
            raise CheckpointError(f"{name} {tuple(tensor.shape)} is missing")
        if found[name].shape != tensor.shape or found[name].is_floating_point() != tensor.is_floating_point():
            raise CheckpointError(
                f"{name}: expected {tensor.dtype} {tuple(tensor.shape)}, found {found[name].dtype} {tuple(found[name].shape)}"
            )
    if extra := next((name for name in found if name not in expected), None):
        raise CheckpointError(f"{parsing.printable(extra)} is not expected")
