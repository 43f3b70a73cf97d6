"""State to go on from, on disk: one safetensors file, all that is not a tensor as JSON in its header; nothing is pickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nmfx.errors import CheckpointError
from nmfx.files import write_atomic

Tensors = dict[str, Tensor]


def write_state(path: Path, kind: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write a state of this kind whole or not at all; `about` is what JSON can say, by its key in the header.

    Raises:
        NmfxError: it cannot be written.
    """
    first: dict[tuple[Any, ...], str] = {}  # safetensors refuses to write a tied weight twice
    shared: dict[str, str] = {}
    for name, value in tensors.items():
        owner = first.setdefault((value.data_ptr(), value.shape, value.stride(), value.dtype), name)
        if owner != name and value.numel():
            shared[name] = owner
    kept = {name: value.detach().contiguous() for name, value in tensors.items() if name not in shared}
    header = {"nmfx": kind, "shared": json.dumps(shared)} | {key: json.dumps(value) for key, value in about.items()}
    write_atomic(path, lambda draft: save_file(kept, draft, metadata=header))


def read_state(path: Path, kind: str, what: str, *keys: str) -> tuple[Tensors, dict[str, Any]]:
    """The tensors that `write_state` was given, and these keys of its `about`.

    Args:
        what: what it should be, for the error.

    Raises:
        CheckpointError: no such file, or it is of another kind.
    """
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors: Tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        if header.get("nmfx") != kind:
            raise ValueError("another kind of file")
        shared, about = json.loads(header["shared"]), {key: json.loads(header[key]) for key in keys}
        return tensors | {name: tensors[owner] for name, owner in shared.items()}, about
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: not {what} to resume ({error}); remove it, or give --force to start anew") from error


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """`tensors` under ``prefix.name``."""
    return {f"{prefix}.{name}": value for name, value in tensors.items()}


def under(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """The tensors under a prefix, without it."""
    return {name.removeprefix(f"{prefix}."): value for name, value in tensors.items() if name.startswith(f"{prefix}.")}
