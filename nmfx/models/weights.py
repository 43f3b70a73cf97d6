"""A file of weights as a state dict: which entry of a training checkpoint is meant, and what wrappers put before its names."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nmfx import text
from nmfx.errors import ModelError

# Entries of training checkpoints, those that timm prefers first: averaged weights score higher than the last ones.
ENTRIES = ("state_dict_ema", "model_ema", "ema_state_dict", "state_dict", "model_state_dict", "model", "net", "weights")
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # of torch.compile, FSDP, checkpointing
State = dict[str, Tensor]


@dataclass(frozen=True)
class Weights:
    """Tensors by name; `entry`: of which part of the file, `others`: what could have been taken instead."""

    state: State
    entry: str = ""
    others: tuple[str, ...] = ()
    prefix: str = ""
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        """What was taken, for the user: empty when the file is a plain state dict."""
        said = [f"entry {self.entry!r}"] if self.entry else []
        said += [f"not {' or '.join(map(repr, self.others))}"] if self.others else []
        said += [f"names without their {self.prefix!r}"] if self.prefix else []
        more = f" and {len(self.left_out) - 3} more" if len(self.left_out) > 3 else ""
        said += [f"without {', '.join(self.left_out[:3])}{more}"] if self.left_out else []
        return ", ".join(said)


def read_weights(path: Path, *, entry: str | None = None) -> Weights:
    """The state dict of a safetensors file, or of a .pth/.pt/.bin read with ``weights_only``.

    Args:
        entry: which one of a checkpoint's entries; None takes averaged weights first, as timm does.

    Raises:
        ModelError: the file cannot be read, holds no state dict of tensors, or no such entry.
    """
    tree = _read(path)
    if not isinstance(tree, Mapping):
        raise ModelError(f"{path}: holds no state dict of tensors but a {type(tree).__name__}")
    found = _states(tree)
    if entry is not None:
        if entry not in found:
            known = ", ".join(found) or "a plain state dict"
            raise ModelError(f"{path}: has no entry {entry!r} of weights{text.nearest(entry, found)}; it has {known}")
        return Weights(found[entry], entry, tuple(name for name in found if name != entry))
    if all(isinstance(value, Tensor) for value in tree.values()):
        return Weights(dict(tree))
    named = [name for name in ENTRIES if name in found] or [name for name in found if _is_weights(found[name])]
    if len(named) > 1 and named[0] not in ENTRIES:
        raise ModelError(f"{path}: holds several state dicts, {', '.join(named)}: say which, with --weights-entry {named[0]}")
    if not named:
        raise ModelError(f"{path}: holds no state dict of tensors")
    return Weights(found[named[0]], named[0], tuple(named[1:]))


def fit_names(weights: Weights, own: Iterable[str]) -> Weights:
    """Weights under the names of a model, `own`, without the prefixes that DataParallel, torch.compile or Lightning add.

    The prefix is whatever stands before the model's own names in the file; tensors beside it (a criterion, a counter of the
    averaging) are left out, and said to be.

    Raises:
        ModelError: the names are there twice, under two prefixes.
    """
    names = list(own)
    bare = {name: name if name in names else _unwrapped(name) for name in weights.state}
    wrapped = len(set(bare.values())) == len(bare) and any(name != old for old, name in bare.items())
    state = {bare[name] if wrapped else name: value for name, value in weights.state.items()}
    prefixes = [name[: -len(mine)] for mine in names[:1] + names[-1:] for name in state if name.endswith(f".{mine}")]
    fits = {prefix: sum(f"{prefix}{mine}" in state for mine in names) for prefix in dict.fromkeys(["", *prefixes])}
    best = max(fits, key=lambda prefix: (fits[prefix], -len(prefix)))
    if twin := next((prefix for prefix in fits if best and prefix != best and fits[prefix] == fits[best] > 1), None):
        raise ModelError(f"the weights are there twice, under {best!r} and {twin!r}: save the state dict of one of them alone")
    aside = {name for name in state if wrapped and not best and name not in names and bare.get(name) == name}
    kept = {name.removeprefix(best): v for name, v in state.items() if name.startswith(best) and name not in aside}
    left = tuple(name for name in state if not name.startswith(best) or name in aside)
    prefix = best or (f"{next(w for w in WRAPPERS if any(w in n for n in weights.state))}." if wrapped else "")
    return Weights(kept, weights.entry, weights.others, prefix, left)


def _read(path: Path) -> Any:
    """The content of a file of weights; of Python's own classes only the bare argparse.Namespace is let through.

    timm's training checkpoints hold one beside the weights. It takes attributes and does nothing.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ModelError(f"{path}: cannot be read as weights: it is a folder") from None
    except Exception as error:  # whatever a damaged file makes the readers raise
        raise ModelError(f"{path}: cannot be read as weights: {_why(error)}") from error


def _why(error: Exception) -> str:
    """Why a file cannot be read, in one line: the class that is not let through, or the reader's sentence."""
    if found := re.search(r"GLOBAL ([\w.]+)|[Tt]rying to \w+ (?:unsupported )?(?:GLOBAL|class) ([\w.]+)", str(error)):
        name = next(filter(None, found.groups())).rstrip(".")
        return (
            f"it holds a {name}, and unpickling that can run code; where you trust the file, keep only its weights: "
            f"x = torch.load(FILE, weights_only=False), then torch.save(x.state_dict(), 'clean.pth') for a whole model, or "
            f"torch.save(x['state_dict'], 'clean.pth') for a dict"
        )
    said = text.sentence(error)
    if "Weights only load failed" in str(error) or isinstance(error, EOFError) or said.isdigit():
        return "it is no file of torch.save, or cut off: give a state dict, saved by torch.save or safetensors"
    return said


def _states(tree: Mapping[Any, Any]) -> dict[str, State]:
    """The entries that are state dicts, by name."""
    return {
        str(name): dict(value)
        for name, value in tree.items()
        if isinstance(value, Mapping) and value and all(isinstance(t, Tensor) and isinstance(k, str) for k, t in value.items())
    }


def _is_weights(state: State) -> bool:
    return any(value.dim() > 1 for value in state.values())


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
