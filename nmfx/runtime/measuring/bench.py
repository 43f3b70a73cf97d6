"""One network on every engine of this machine, in one run, in turns: what nmfx bench shows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nmfx.errors import NmfxError
from nmfx.progress import Progress, silent
from nmfx.runtime.compiler import compile
from nmfx.runtime.measuring.choices import Choice
from nmfx.runtime.measuring.latency import COMPILED, dense_runs
from nmfx.runtime.measuring.timing import mean_seconds, on_threads, portion

Run = Callable[[], object]
NMFX, MASKED = "nmfx", "masked, eager"
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
    """

    timings: tuple[Timing, ...]
    choices: Mapping[tuple[int, int], tuple[Choice, ...]]
    missing: Mapping[str, str]
    difference: float

    def of(self, engine: str, batch: int, threads: int) -> Timing | None:
        """The timing of one engine; None if it could not run."""
        wanted = (engine, batch, threads)
        return next((one for one in self.timings if (one.engine, one.batch, one.threads) == wanted), None)

    def best_dense(self, batch: int, threads: int) -> Timing:
        """The timing of the fastest dense engine, by medians."""
        found = [one for one in self.timings if (one.batch, one.threads) == (batch, threads)]
        return min((one for one in found if one.engine not in (NMFX, MASKED)), key=lambda one: one.median)

    def speedup(self, batch: int, threads: int) -> float:
        """How many times as fast nmfx is as the fastest dense engine, by medians."""
        ours = self.of(NMFX, batch, threads)
        assert ours is not None
        return self.best_dense(batch, threads).median / ours.median


def bench(
    dense: nn.Module,
    converted: nn.Module,
    example: Tensor,
    *,
    batches: tuple[int, ...] = (1, 8),
    threads: tuple[int, ...] = (),
    turns: int = 15,
    onnx: Path | None = None,
    progress: Progress = silent,
) -> Bench:
    """Time a dense model and its converted counterpart on `example` repeated to each batch size.

    Args:
        dense: the network before its weights were pruned.
        converted: the same network, masked.
        example: pictures ``(batch, channels, height, width)``, of which the first is used.
        batches: batch sizes to time.
        threads: numbers of threads of torch and of ONNX Runtime; 1 and torch's own when empty.
        turns: turns of each engine, of `TURN` seconds or more.
        onnx: the dense model as ONNX with a free batch size; None leaves ONNX Runtime out.
        progress: called with the share done and what is being done.

    Returns:
        Timings, choices and the difference of outputs; engines that cannot run are in ``missing``.

    Raises:
        ModelError: torch.export cannot follow the model.
    """
    threads = threads or tuple(dict.fromkeys((1, torch.get_num_threads())))
    timings, choices, missing = list[Timing](), dict[tuple[int, int], tuple[Choice, ...]](), dict[str, str]()
    difference = 0.0
    combinations = [(batch, count) for count in threads for batch in batches]
    for number, (batch, count) in enumerate(combinations):
        x = example[:1].expand(batch, *example.shape[1:]).contiguous()
        say = portion(progress, number, len(combinations))
        with on_threads(count), torch.no_grad():
            say(0.0, "compiling with torch.compile")
            engines = dense_runs(dense, x)
            if COMPILED not in engines:
                missing[COMPILED] = "it cannot compile this model"
            if onnx is not None:
                try:
                    engines["ONNX Runtime"] = _onnx_engine(onnx, x, count)
                except (NmfxError, RuntimeError, ValueError) as error:
                    missing["ONNX Runtime"] = " ".join(str(error).split())[:200]
            engines[MASKED] = partial(converted, x)
            say(0.5, "compiling with nmfx")
            ours = compile(converted.eval(), x)
            engines[NMFX] = partial(ours, x)
            choices[batch, count] = ours.choices
            difference = max(difference, _difference(ours(x), converted(x)))
            found = in_turns(engines, turns, say)
            timings += [Timing(name, batch, count, seconds) for name, seconds in found.items()]
    return Bench(tuple(timings), choices, missing, difference)


def in_turns(runs: Mapping[str, Run], turns: int, progress: Progress) -> dict[str, tuple[float, ...]]:
    """Seconds a call of each, a number a turn; all take turns, so that what else the machine does meets all of them."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns):
        for name, run in runs.items():
            mean_seconds(run, SETTLE)
            found[name].append(mean_seconds(run, TURN))
        progress(0.6 + 0.4 * (turn + 1) / turns, "measuring")
    return {name: tuple(seconds) for name, seconds in found.items()}


def _onnx_engine(path: Path, x: Tensor, threads: int) -> Run:
    try:
        import onnxruntime
    except ImportError:
        raise NmfxError("pip install 'nmfx[onnx]'") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)


def _difference(found: object, wanted: object) -> float:
    pairs = zip(tree_leaves(found), tree_leaves(wanted), strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in pairs if isinstance(b, Tensor))
