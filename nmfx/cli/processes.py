"""Several processes: started by torchrun, seen through torch.distributed; the first one speaks for all."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import torch
import torch.distributed as dist

from nmfx.cli.console import silence
from nmfx.errors import NmfxError
from nmfx.processes import rank, world


@contextlib.contextmanager
def processes(device: str = "auto") -> Iterator[str]:
    """Join the group that torchrun has set up, if it has, and yield the device of this process; only the first one prints.

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
        if rank():
            silence()
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
