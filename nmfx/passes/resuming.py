"""A correction that was stopped goes on: what it has done, in a file that is written after weights that are done."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from nmfx.errors import CheckpointError, NmfxError
from nmfx.files.parsing import Count, Finite, Form, printable
from nmfx.files.sealed import digest_of
from nmfx.files.states import check_tensors, read_state, write_state
from nmfx.passes.layerwise import Corrected
from nmfx.passes.network import Network

KIND = "correction"
SHARE = 10  # as much time as writing takes passes so many times before it is done again


class _Record(Form, frozen=True):
    """A `Corrected` in a file; no numbers where it has none."""

    name: str
    chosen: str
    before: Finite | None
    after: Finite | None


class _About(Form, frozen=True):
    """What a state says beside its tensors: of which correction it is, how many stops are done, and what became of weights."""

    settings: dict[str, Any]
    stops: Count
    records: list[_Record]


@dataclass
class Ledger:
    """The file of one correction, for its whole life.

    Args:
        path: of a safetensors file; None: nothing is written.
        settings: what decides the result.
        network: the one that is corrected, as it starts.
    """

    path: Path | None
    settings: Mapping[str, Any]
    network: Network
    due: float = -math.inf

    def load(self) -> tuple[int, list[Corrected]]:
        """How many stops have been done, and what became of them; the network has their values then.

        Raises:
            NmfxError: a file that is of another correction, or of none.
        """
        if self.path is None or not self.path.exists():
            return 0, []
        tensors, about = read_state(self.path, KIND, "a correction", _About)
        now = json.loads(json.dumps(dict(self.settings)))
        if odd := [f"{key} {about.settings.get(key)} -> {now[key]}" for key in now if about.settings.get(key) != now[key]]:
            raise CheckpointError(
                f"{self.path} is of a correction with other settings ({printable('; '.join(odd))}); give the same ones to "
                "resume it, or --force to start anew"
            )
        values = self.network.values
        try:
            check_tensors(values, tensors)
        except NmfxError as error:
            raise CheckpointError(f"{self.path}: not of this correction ({error}); remove it, or give --force") from error
        for name, value in values.items():
            value.copy_(tensors[name])
        records = [Corrected(one.name, one.chosen, _number(one.before), _number(one.after)) for one in about.records]
        return about.stops, records

    def save(self, stops: int, records: Sequence[Corrected]) -> None:
        """Write what has been done, unless that has just been done."""
        start = time.monotonic()
        if self.path is None or start < self.due:
            return
        about = [{**vars(one), "before": _finite(one.before), "after": _finite(one.after)} for one in records]
        said = {"settings": dict(self.settings), "stops": stops, "records": about}
        write_state(self.path, KIND, self.network.values, said)
        now = time.monotonic()
        self.due = now + SHARE * (now - start)


def digest(tree: Any, said: str = "") -> str:
    """16 hexadecimal digits for all tensors in lists, tuples and dicts, and for what is `said`."""
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    found = {str(index): tensor.detach().cpu().contiguous() for index, tensor in enumerate(tensors)}
    return digest_of({"said": said}, found)[:16]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.nan if value is None else value
