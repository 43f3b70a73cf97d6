"""Seconds of single operators on this machine, measured in turns and remembered on disk."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch

from nmfx.errors import NmfxError
from nmfx.files.atomic import write_atomic
from nmfx.files.drafts import locked
from nmfx.files.parsing import Form, Seconds, read_json
from nmfx.progress import Progress
from nmfx.runtime.kernel.library import kernel_digest, processor

ROUNDS, TURN_SECONDS = 7, 0.004  # turns of each candidate, and the shortest time of one
QUICK_ROUNDS, QUICK_SECONDS = 2, 0.001  # the same where few are tried
ENOUGH = 0.01  # seconds of turns of one candidate, then
NETWORK_SECONDS = 0.1  # the shortest time of a turn of a whole network
HOPELESS = 1.6  # times the fastest: more than what a choice between ways to compute a site forgives
PACE_ROUNDS, PACE_SECONDS = 5, 0.001  # of the small computation that says how fast the machine is
CHANGED = 1.5  # times as long or as short as before: another pace, at which other ways may be the fastest
PATIENCE = 10  # seconds that another process may take to save
SETTINGS = (
    "ATEN_CPU_CAPABILITY",
    "DNNL_MAX_CPU_ISA",
    "ONEDNN_MAX_CPU_ISA",
    "KMP_AFFINITY",
    "GOMP_CPU_AFFINITY",
    "OMP_PROC_BIND",
)
log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where measured times are kept: $NMFX_CACHE, or nmfx/ in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("NMFX_CACHE") or Path(base) / "nmfx")


def portion(progress: Progress, number: int, parts: int) -> Progress:
    """What part `number` of `parts` reports its share of the work to: `progress`, as a share of all of it."""
    return lambda share, what: progress((number + share) / parts, what)


@contextlib.contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Let operators share `count` threads within a ``with`` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    rounds: int | None = None,
    seconds: float | None = None,
    hopeless: float = math.inf,
    enough: float = math.inf,
) -> dict[str, float]:
    """The fastest of `rounds` turns of each candidate, in seconds a call; all take turns, so that noise meets all of them.

    Args:
        rounds: turns of each candidate; `ROUNDS` when None.
        seconds: length of a turn, of 50 calls at most; `TURN_SECONDS` when None, `NETWORK_SECONDS` for whole networks, whose
            caches and threads need longer to settle.
        hopeless: a candidate that takes this many times as long as the fastest has one turn only.
        enough: seconds after which a candidate, which has had a turn, has no other; a call of a fifth of that needs none before
            it to settle.
    """
    seconds = TURN_SECONDS if seconds is None else seconds
    best, spent = {}, dict.fromkeys(candidates, 0.0)
    for name, run in candidates.items():
        run()
        best[name] = mean_seconds(run, 0.0)
    for turn in range(ROUNDS if rounds is None else rounds):
        limit = hopeless * min(best.values())
        for name, run in candidates.items():
            if not turn or (best[name] <= limit and spent[name] < enough):
                start = time.perf_counter()
                if best[name] < enough / 5:  # what takes longer settles while it runs
                    run()
                best[name] = min(best[name], mean_seconds(run, seconds, most=50))
                spent[name] += time.perf_counter() - start
    return best


def mean_seconds(run: Callable[[], Any], seconds: float, most: float = math.inf) -> float:
    """Mean seconds of a call, over as many calls as take `seconds` or more, one or more and `most` at most."""
    calls, took, start = 0, 0.0, time.perf_counter()
    while not calls or (calls < most and took < seconds):
        run()
        calls, took = calls + 1, time.perf_counter() - start
    return took / calls


class _Kept(Form, frozen=True):
    """The file of measured seconds; `digest` is of all else, so that a damaged one is not taken for another measurement."""

    machine: dict[str, str]
    pace: dict[str, Seconds]
    known: dict[str, dict[str, Seconds]]
    digest: str

    def is_whole(self) -> bool:
        """Whether the digest is that of the content: nothing was altered since it was written."""
        return self.digest == _digest(self.machine, self.pace, self.known)


class Times:
    """Measured seconds for this machine, kernel, torch and number of threads, remembered on disk.

    Quick ones are measured in fewer and shorter turns. They are forgotten when the machine's pace is no longer what it was:
    when a small computation takes `CHANGED` times as long as it did then, or as little.
    """

    def __init__(self, *, quick: bool = False) -> None:
        self.quick = quick
        self.rounds, self.seconds = (QUICK_ROUNDS, QUICK_SECONDS) if quick else (ROUNDS, TURN_SECONDS)
        self.machine = machine() | {
            "threads": str(torch.get_num_threads()), "measured": f"{self.rounds} x {self.seconds} s"
        }  # fmt: skip
        self.path = cache_folder() / "times" / f"{_digest(self.machine)[:24]}.json"
        self.pace = measure_pace()
        self.new: dict[str, dict[str, float]] = {}
        kept = self._kept()
        self.known = kept.known if kept else {}

    def get(
        self, what: Any, names: Collection[str], candidates: Callable[[], Mapping[str, Callable[[], Any]]]
    ) -> dict[str, float]:
        """Seconds of each candidate for the question `what`, measured if nobody has asked it before.

        Args:
            names: of the candidates.
        """
        key = _digest(what)[:24]
        found = self.known.get(key)
        if found is None or found.keys() != set(names):
            found = self.known[key] = self.new[key] = measure(
                candidates(), rounds=self.rounds, seconds=self.seconds, hopeless=HOPELESS,
                enough=ENOUGH if self.quick else math.inf,
            )  # fmt: skip
        return found

    def save(self) -> None:
        """Keep what was measured, beside what other processes have measured meanwhile; a cache folder that cannot be written to
        costs only the time to measure again.
        """
        if not self.new:
            return
        with contextlib.suppress(NmfxError, OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with locked(self.path.with_suffix(".lock"), PATIENCE):
                kept = self._kept()
                pace = kept.pace if kept else self.pace  # of the oldest, or it could change step by step unnoticed
                known = (kept.known if kept else {}) | self.new
                content = _Kept(self.machine, pace, known, _digest(self.machine, pace, known))
                write_atomic(self.path, lambda new: new.write_bytes(msgspec.json.encode(content)), mode=0o644)
                self.known, self.new = known, {}

    def _kept(self) -> _Kept | None:
        """The file of this machine at this pace; None if it is absent, damaged or of another form."""
        try:
            kept = read_json(self.path, _Kept, "measured times")
        except NmfxError as error:
            log.info("measured again: %s", error)
            return None
        if not kept.is_whole() or kept.machine != self.machine or not same_pace(kept.pace, self.pace):
            log.info("measured again: %s is damaged, of another machine, or of this one at another pace", self.path)
            return None
        return kept


def machine() -> dict[str, str]:
    """All that times depend on and that the system tells: processor, system, libraries and the kernel."""
    return _hardware() | {
        "cores": f"{os.cpu_count()}, of them {sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else 'all'}",
        "torch": str(torch.__version__),
        "kernel": kernel_digest(),
        "settings": " ".join(f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ),
    }


@functools.cache
def _hardware() -> dict[str, str]:
    return {
        "processor": processor(),
        "clock": _said("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq"),
        "governor": _said("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "quota": _said("/sys/fs/cgroup/cpu.max"),  # of a container
        "product": _said("/sys/class/dmi/id/product_name"),  # of a virtual machine: which kind
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def _said(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()[:200]
    except OSError:
        return ""


def measure_pace() -> dict[str, float]:
    """Seconds of a fixed product and of a fixed copy of memory: how fast this machine is now."""
    left, right, memory = torch.ones(128, 512), torch.ones(512, 128), torch.zeros(1 << 18)
    candidates = {"product": lambda: left @ right, "copy": memory.clone}
    return measure(candidates, rounds=PACE_ROUNDS, seconds=PACE_SECONDS)


def same_pace(before: Mapping[str, float], now: Mapping[str, float]) -> bool:
    """Whether no part of the pace has changed by more than a factor of `CHANGED`."""
    return before.keys() == now.keys() and all(1 / CHANGED <= before[name] / now[name] <= CHANGED for name in now)


def _digest(*what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()
