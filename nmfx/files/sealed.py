"""A safetensors file of ours: tensors, and a header in JSON under one SHA-256 with them. Nothing is pickled.

The file's metadata has one entry of ours, ``nmfx``: a JSON object with ``version``, what the caller says, and ``digest``, over
all of it and every bit of every tensor.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nmfx.errors import CheckpointError
from nmfx.files import parsing
from nmfx.files.atomic import write_atomic

MOST_HEADER = 16 << 20  # bytes: 100,000 tensors
Tensors = dict[str, Tensor]


def write_sealed(path: Path, content: Mapping[str, Any], tensors: Mapping[str, Tensor], *, force: bool = True) -> None:
    """Write both whole or not at all; tensors are on the CPU and contiguous.

    Raises:
        NmfxError: it cannot be written, or a file is there and `force` is false; `content` holds a number that is not finite.
    """
    sealed = {**content, "digest": digest_of(content, tensors)}
    try:
        metadata = {"nmfx": json.dumps(sealed, sort_keys=True, allow_nan=False)}
    except ValueError as error:
        raise CheckpointError(f"{path}: its header would hold a number that is not finite, and could not be read") from error
    write_atomic(path, lambda draft: save_file(dict(tensors), draft, metadata=metadata), force=force)


def find_aliases(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Names whose tensor is another one's, which stands before them: the same memory, shape, strides and type."""
    owners: dict[tuple[Any, ...], str] = {}
    keys = {name: (v.data_ptr(), tuple(v.shape), v.stride(), v.dtype) for name, v in tensors.items() if v.numel()}
    return {name: owner for name, key in keys.items() if (owner := owners.setdefault(key, name)) != name}


def digest_of(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a header without its digest and of all tensors, their names, types and shapes."""
    digest = hashlib.sha256(json.dumps({k: v for k, v in content.items() if k != "digest"}, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data if value.numel() else b"")
    return digest.hexdigest()


def read_sealed(path: Path, what: str, version: int, *, otherwise: str = "") -> tuple[dict[str, Any], Tensors]:
    """What `write_sealed` was given, after checking that not a bit has changed since.

    Args:
        what: what it should be, as ``a checkpoint``.
        version: the newest that can be read.
        otherwise: advice for a safetensors file that is not of ours.

    Raises:
        CheckpointError: no such file; truncated, altered, foreign, or of another version.
    """
    metadata, tensors = read_tensors(path)
    if "nmfx" not in metadata:
        raise CheckpointError(f"{path}: a safetensors file, but not {what} of nmfx{otherwise}")
    content = parsing.json_tree(metadata["nmfx"], f"{path}: its header is damaged", CheckpointError)
    if not isinstance(content, dict) or not {"version", "digest"} <= content.keys():
        raise CheckpointError(f"{path}: its header is damaged: no version or digest; make it anew")
    found = content["version"]
    if not isinstance(found, int) or isinstance(found, bool) or not 1 <= found <= version:
        said = parsing.printable(str(found), 20)
        raise CheckpointError(f"{path}: {what} of version {said}, this nmfx reads version {version}; upgrade nmfx")
    if content.pop("digest") != digest_of(content, tensors):
        raise CheckpointError(f"{path}: altered since it was written (the SHA-256 differs); make or copy it anew")
    return content, tensors


def read_tensors(path: Path) -> tuple[dict[str, str], Tensors]:
    """Metadata and tensors of a safetensors file.

    Raises:
        CheckpointError: no such file, truncated, or none.
    """
    with _opened(path) as file:
        return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a safetensors file, which are not read; errors are those of `read_tensors`."""
    with _opened(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a mapping


def read_metadata(path: Path) -> dict[str, str]:
    """Metadata of a safetensors file; errors are those of `read_tensors`."""
    with _opened(path) as file:
        return file.metadata() or {}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    _check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except MemoryError:
        raise
    except Exception as problem:  # of the library, of its Rust half, of torch: types and sizes that it does not know
        raise CheckpointError(f"{path}: truncated, or not a safetensors file ({parsing.printable(str(problem))})") from problem


def _check_header(path: Path) -> None:
    """Raise unless `path` is a regular file whose header is there and of a size that is no burden."""
    try:
        with parsing.open_regular(path, "safetensors", CheckpointError) as file:
            size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
    except OSError as problem:
        raise CheckpointError(f"{path}: cannot be read: {problem.strerror or problem}") from problem
    if size < 8 or length > size - 8 or length > MOST_HEADER:
        raise CheckpointError(f"{path}: truncated, or not a safetensors file (a header of {length} bytes, {size} in all)")
