"""Processes: those that torchrun started, which one this is, sums over all of them; and Ctrl-C held back for a moment."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor

from nmfx.errors import NmfxError


def rank() -> int:
    """The number of this process; 0 is the one that writes."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def summed(values: Tensor) -> Tensor:
    """`values` summed over all processes, in place; every process has to ask."""
    if world() > 1:
        dist.all_reduce(values)
    return values


@contextlib.contextmanager
def joined(device: str = "auto") -> Iterator[str]:
    """Join the group that torchrun has set up, if it has, and yield the device of this process.

    Raises:
        NmfxError: an unknown device.
    """
    wanted, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    gpus = torch.cuda.device_count()
    chosen = device if device != "auto" else f"cuda:{local % gpus}" if gpus else "cpu"
    try:
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise NmfxError(f"--device {device}: {str(error).splitlines()[0]}") from error
    if wanted == 1:
        yield chosen
        return
    dist.init_process_group("nccl" if chosen.startswith("cuda") else "gloo")
    try:
        yield chosen
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """Let the first process through the block before the others: what it writes there, they find."""
    if rank():
        dist.barrier()
    yield
    if not rank() and world() > 1:
        dist.barrier()


@contextlib.contextmanager
def asked_to_stop() -> Iterator[Callable[[], None]]:
    """Hold Ctrl-C back until the function that is yielded is called, between two steps of something that can be resumed, or
    the block ends; a second one interrupts at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    asked: list[int] = []

    def stop() -> None:
        if asked:
            raise KeyboardInterrupt

    def ask(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield stop
        stop()
    finally:
        signal.signal(signal.SIGINT, before)
