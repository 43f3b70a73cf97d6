"""A compressed checkpoint as a network to go on from: its weights with real zeros, and the scheme they are under."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from nmfx.export.checkpoint import load_checkpoint, read_checkpoint
from nmfx.files.sealed import read_metadata
from nmfx.models.building import Built, build_random
from nmfx.models.site import Sites
from nmfx.models.source import Source
from nmfx.passes.baking import bake
from nmfx.passes.transform import scheme_of
from nmfx.scheme import Scheme, shapes_of


def is_compressed(path: str | Path) -> bool:
    """Whether a file holds what `save_checkpoint` wrote, rather than plain weights.

    Raises:
        CheckpointError: a safetensors file that is not there or cannot be read.
    """
    if Path(path).suffix not in (".safetensors", ".nmfxc"):  # of compiled models, which reading a checkpoint refuses by name
        return False
    return "nmfx" in read_metadata(Path(path))


def build_start(path: Path, source: Source) -> Built:
    """The converted network of a compressed checkpoint, built as the checkpoint says where that is `source` without arguments.

    Raises:
        CheckpointError: the file is truncated, altered or foreign, or of another network than `source`.
    """
    said, note = read_checkpoint(path)[0].source, f"weights from {path}"
    if said is not None and str(said) == str(source) and not source.kwargs:
        return Built(load_checkpoint(path), said, "file", note)
    return Built(load_checkpoint(path, build_random(source)), source, "file", note)


def detach_scheme(model: nn.Module, sites: Sites) -> Scheme | None:
    """Bake a converted model in place and give the scheme that it was under; None for a model that is plain already."""
    scheme = scheme_of(model)
    if not scheme:
        return None
    bake(model, inplace=True)
    return replace(scheme, shapes=shapes_of(sites), info={"model": sites.model})
