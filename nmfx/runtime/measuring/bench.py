"""One network on every engine of this machine, in one run, in turns: what nmfx bench shows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nmfx.errors import NmfxError
from nmfx.progress import Progress, silent
from nmfx.runtime.compiler import compile
from nmfx.runtime.measuring.choices import Choice
from nmfx.runtime.measuring.engines import open_engine
from nmfx.runtime.measuring.latency import COMPILED, dense_runs
from nmfx.runtime.measuring.timing import mean_seconds, on_threads, portion
from nmfx.runtime.quantized.compiling import Agreement
from nmfx.settings.engines import ENGINES

Run = Callable[[], object]
NMFX, MASKED = "nmfx", "masked, eager"
INT8 = frozenset(one.label for one in ENGINES.values() if one.int8)
TURN = 0.1  # seconds of one engine in one turn, at least
SETTLE = 0.15  # and before that, until the threads of the one before it no longer wait for work: ONNX Runtime's do so for 75 ms


@dataclass(frozen=True)
class Timing:
    """Seconds of one batch on one engine, a number a turn."""

    engine: str
    batch: int
    threads: int
    seconds: tuple[float, ...] = field(repr=False)

    @property
    def median(self) -> float:
        """The median of all turns, in seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """The fastest and the slowest turn, in seconds."""
        return min(self.seconds), max(self.seconds)


@dataclass(frozen=True)
class Bench:
    """The result of `bench`.

    Attributes:
        timings: of every engine, batch size and number of threads.
        choices: how nmfx computes each site, by (batch, threads).
        missing: engines that could not run, and why.
        difference: the largest difference between nmfx's outputs and the masked model's, as a share of the largest output.
        agreement: of nmfx in int8 with float32; None in float32.
    """

    timings: tuple[Timing, ...]
    choices: Mapping[tuple[int, int], tuple[Choice, ...]]
    missing: Mapping[str, str]
    difference: float
    agreement: Agreement | None = None

    def of(self, engine: str, batch: int, threads: int) -> Timing | None:
        """The timing of one engine; None if it could not run."""
        wanted = (engine, batch, threads)
        return next((one for one in self.timings if (one.engine, one.batch, one.threads) == wanted), None)

    def best_dense(self, batch: int, threads: int, *, int8: bool = False) -> Timing | None:
        """The timing of the fastest dense engine in fp32, or in int8, by medians; None if there was none."""
        found = [one for one in self.timings if (one.batch, one.threads) == (batch, threads)]
        dense = [one for one in found if one.engine not in (NMFX, MASKED) and (one.engine in INT8) == int8]
        return min(dense, key=lambda one: one.median, default=None)

    def speedup(self, batch: int, threads: int, *, int8: bool = False) -> float | None:
        """How many times as fast nmfx is as the fastest dense engine in fp32, or in int8; None if there was none."""
        ours, best = self.of(NMFX, batch, threads), self.best_dense(batch, threads, int8=int8)
        return best.median / ours.median if best and ours else None


def bench(
    dense: nn.Module,
    converted: nn.Module,
    example: Tensor,
    *,
    batches: tuple[int, ...] = (1, 8),
    threads: tuple[int, ...] = (),
    turns: int = 15,
    onnx: Path | None = None,
    engines: Sequence[str] = tuple(ENGINES),
    tune: str = "quick",
    calibration: Tensor | None = None,
    progress: Progress = silent,
) -> Bench:
    """Time a dense model and its converted counterpart on `example` repeated to each batch size.

    Args:
        dense: the network before its weights were pruned.
        converted: the same network, masked.
        example: pictures ``(batch, channels, height, width)``, of which the first is used.
        batches: batch sizes to time.
        threads: numbers of threads of every engine; 1 and torch's own when empty.
        turns: turns of each engine, of `TURN` seconds or more.
        onnx: the dense model as ONNX with a free batch size; None leaves the engines out that need it.
        engines: names of `nmfx.settings.engines.ENGINES` to time beside PyTorch's own.
        tune: as `nmfx.compile` has it.
        calibration: pictures by which nmfx compiles for int8; None: float32. Fewer than a batch are repeated.
        progress: called with the share done and what is being done.

    Returns:
        Timings, choices and the difference of outputs; engines that cannot run are in ``missing``.

    Raises:
        ModelError: torch.export cannot follow the model.
    """
    threads = threads or tuple(dict.fromkeys((1, torch.get_num_threads())))
    timings, choices, missing = list[Timing](), dict[tuple[int, int], tuple[Choice, ...]](), dict[str, str]()
    difference, agreement = 0.0, None
    combinations = [(batch, count) for count in threads for batch in batches]
    for number, (batch, count) in enumerate(combinations):
        x = example[:1].expand(batch, *example.shape[1:]).contiguous()
        say = portion(progress, number, len(combinations))
        with on_threads(count), torch.no_grad():
            say(0.0, "compiling with torch.compile")
            runs = dense_runs(dense, x)
            if COMPILED not in runs:
                missing[COMPILED] = "it cannot compile this model"
            if onnx is not None:
                for done, engine in enumerate(ENGINES[name] for name in engines):
                    say(0.2 + 0.3 * done / len(engines), f"opening {engine.label}")
                    try:
                        runs[engine.label] = open_engine(engine, onnx, x, count)
                    except NmfxError as error:
                        missing[engine.label] = str(error)
            runs[MASKED] = partial(converted, x)
            say(0.5, "compiling with nmfx")
            how: dict[str, Any] = {"tune": tune, "progress": portion(say, 5, 10)}
            if calibration is not None:
                times = -(-batch // len(calibration))
                how |= {"precision": "int8", "calibration": calibration.repeat(times, *[1] * (calibration.dim() - 1))}
            ours = compile(converted.eval(), x, **how)
            agreement = ours.agreement or agreement
            runs[NMFX] = partial(ours, x)
            choices[batch, count] = ours.choices
            difference = max(difference, _difference(ours(x), converted(x)))
            found = in_turns(runs, turns, say)
            timings += [Timing(name, batch, count, seconds) for name, seconds in found.items()]
    return Bench(tuple(timings), choices, missing, difference, agreement)


def in_turns(runs: Mapping[str, Run], turns: int, progress: Progress) -> dict[str, tuple[float, ...]]:
    """Seconds a call of each, a number a turn; all take turns, so that what else the machine does meets all of them."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns):
        for name, run in runs.items():
            mean_seconds(run, SETTLE)
            found[name].append(mean_seconds(run, TURN))
        progress(0.6 + 0.4 * (turn + 1) / turns, "measuring")
    return {name: tuple(seconds) for name, seconds in found.items()}


def _difference(found: object, wanted: object) -> float:
    pairs = zip(tree_leaves(found), tree_leaves(wanted), strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in pairs if isinstance(b, Tensor))
