"""Seconds of single operators on this machine, measured in turns and remembered on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from nmfx.errors import NmfxError
from nmfx.files import write_atomic
from nmfx.runtime.building import cache_folder, identity

Advance = Callable[[float, str], None]  # told the share done, and of what
ROUNDS, LEAST_SECONDS = 7, 0.004  # turns, and time of one candidate in a turn at least
WHOLE = 0.1  # the same of a whole network
HOPELESS = 1.6  # times the fastest: more than what a choice between ways to compute a site forgives


def ignore(share: float, what: str) -> None:
    """An Advance for those who are not told."""


def part(progress: Advance, number: int, parts: int) -> Advance:
    """The Advance of one of several parts of the work."""
    return lambda share, what: progress((number + share) / parts, what)


def measure(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = ROUNDS,
    least: float | None = None,
    hopeless: float = math.inf,
) -> dict[str, float]:
    """The fastest of `rounds` turns of each candidate, in seconds a call; all take turns, so that noise meets all of them.

    Args:
        least: seconds of a turn, of 50 calls at most; `WHOLE` for networks, whose caches and threads want to settle.
        hopeless: who takes so many times as long as the fastest, has no more turns after the first.
    """
    least = LEAST_SECONDS if least is None else least
    repeats, best = {}, {}
    for name, run in candidates.items():
        run()
        start = time.perf_counter()
        run()
        took = time.perf_counter() - start
        repeats[name], best[name] = max(1, min(50, int(least / max(took, 1e-9)))), took
    for turn in range(rounds):
        limit = hopeless * min(best.values())
        for name, run in candidates.items():
            if turn and best[name] > limit:
                continue
            run()
            start = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            best[name] = min(best[name], (time.perf_counter() - start) / repeats[name])
    return best


class Times:
    """A file of measured seconds for this processor, kernel, torch and number of threads."""

    def __init__(self) -> None:
        about = f"{identity()}-{torch.get_num_threads()}"
        self.path = cache_folder() / "times" / f"{about}.json"
        self.known: dict[str, dict[str, float]] = {}
        with contextlib.suppress(OSError, ValueError):  # nothing measured yet, or not readable: it is measured again
            self.known = json.loads(self.path.read_text(encoding="utf-8"))

    def get(self, what: Any, candidates: Callable[[], Mapping[str, Callable[[], Any]]]) -> dict[str, float]:
        """Seconds of each candidate for the question `what`, measured if nobody has asked it before."""
        key = hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:24]
        if key not in self.known:
            self.known[key] = measure(candidates(), hopeless=HOPELESS)
        return self.known[key]

    def save(self) -> None:
        """Keep what was measured; a cache folder that cannot be written to costs only the time to measure again."""
        with contextlib.suppress(NmfxError):
            write_atomic(self.path, self._write)

    def _write(self, path: Path) -> None:
        path.write_text(json.dumps(self.known), encoding="utf-8")
