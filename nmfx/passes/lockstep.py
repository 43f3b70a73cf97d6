"""Several forward passes of one model that wait for each other at the operations one asks to see.

A forward pass over some hundreds of pictures would be run again from the start for every layer that is changed on the way.
Here each batch has a thread of its own, which stops at each operation of interest with what it has computed so far; one thread
runs at a time, in the order of the batches, so the result does not depend on timing. Any model that runs can be stopped
so: nothing is traced.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from nmfx.models.following import plain_kernels


class _Cancelled(BaseException):
    """Ends a thread whose run is given up."""


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy with the same parameters and buffers; what modules keep between their operations is its own."""
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


class Call:
    """An operation at which a run has stopped, before it is computed.

    Attributes:
        func, args, kwargs: the aten operation and what it is given.
        tag: what `wanted` made of it.
        out: what it gave, once `compute` has run; the run then goes on with that.
    """

    def __init__(self, func: Any, args: Any, kwargs: Any, tag: Any) -> None:
        self.func, self.args, self.kwargs, self.tag = func, args, kwargs, tag
        self.out: Any = None
        self.done = False

    def compute(self) -> Any:
        """The operation's result, computed once."""
        if not self.done:
            self.out, self.done = self.func(*self.args, **self.kwargs), True
        return self.out


class _Stops(TorchDispatchMode):
    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call, index = Call(func, args, kwargs or {}, None), self.run.operations
        self.run.operations += 1
        call.tag = self.run.wanted(func._schema.name, args)
        if call.tag is not None:
            self.run.stop_at(call)
        out = call.compute()
        if index in self.run.keep:
            self.run.kept[index] = out if isinstance(out, Tensor) else out[0]
        return out


class Run:
    """One forward pass that stops at wanted operations.

    Args:
        model: run in the mode it is in, without gradients, as a copy that shares its tensors: what modules keep between their
            operations is the run's own.
        x: the input: a tensor, positional arguments as a tuple or a list, or a dict of arguments by name.
        wanted: ``(name, args)`` of an aten operation -> a tag, or None to go on.
        keep: the operations, counted from 0, whose first results go into ``kept`` until somebody takes them away.
    """

    def __init__(self, model: nn.Module, x: Any, wanted: Callable[[str, Any], Any], keep: Collection[int] = ()) -> None:
        self.model, self.x, self.wanted, self.keep = sharing_copy(model), x, wanted, keep
        self.operations, self.kept = 0, dict[int, Any]()
        self.stopped_at: Call | None = None
        self.error: BaseException | None = None
        self._mine, self._theirs = threading.Semaphore(0), threading.Semaphore(0)
        self._cancelled = self.ended = False
        self._thread = threading.Thread(target=self._work, daemon=True)

    def _work(self) -> None:
        self._mine.acquire()
        try:
            if not self._cancelled:
                with torch.no_grad(), _Stops(self):
                    if isinstance(self.x, dict):
                        self.model(**self.x)
                    else:
                        self.model(*(self.x if isinstance(self.x, tuple | list) else (self.x,)))
        except _Cancelled:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self.ended, self.stopped_at = True, None
            self._theirs.release()

    def stop_at(self, call: Call) -> None:
        """Called in the run's own thread: hand over until `advance` is called again."""
        self.stopped_at = call
        self._theirs.release()
        self._mine.acquire()
        if self._cancelled:
            raise _Cancelled
        self.stopped_at = None

    def advance(self) -> Call | None:
        """Go on to the next wanted operation; None at the end.

        Raises:
            whatever the forward pass raises.
        """
        if self.ended:
            return None
        if not self._thread.is_alive():
            self._thread.start()
        self._mine.release()
        self._theirs.acquire()
        if self.error is not None:
            raise self.error
        return self.stopped_at

    def cancel(self) -> None:
        """Give up: the thread ends."""
        self._cancelled = True
        if self._thread.is_alive():
            self._mine.release()
            self._thread.join()


@contextmanager
def running(
    model: nn.Module, inputs: Sequence[Any], wanted: Callable[[str, Any], Any], keep: Collection[int] = ()
) -> Iterator[list[Run]]:
    """Runs of `model`, one for each input, that end with the ``with`` block."""
    runs = [Run(model, x, wanted, keep) for x in inputs]
    with plain_kernels(convolutions=any(isinstance(module, nn.RNNBase) for module in model.modules())):
        try:
            yield runs
        finally:
            for run in runs:
                run.cancel()


def give_back_memory() -> None:
    """Have the C library give freed memory back to the system: glibc keeps what its many threads have freed."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def moved(x: Any, device: torch.device) -> Any:
    """Tensors of `x` on a device."""
    return tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, x)
