"""Work in forked processes: quick, and what it patches, loads or kills is its own."""

from __future__ import annotations

import json
import os
import traceback
import warnings
from collections.abc import Callable
from typing import Any


def forked(work: Callable[[], object]) -> int:
    """Run `work` in a forked process; its number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch has threads; the child touches none of them
        child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


class Answer:
    """What `work` returns in a process of its own, as JSON."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.pipe, write = os.pipe()
        self.child = forked(lambda: os.write(write, json.dumps(work()).encode()))
        os.close(write)

    def get(self) -> Any:
        """Wait for it."""
        with open(self.pipe, "rb") as file:
            said = file.read()
        _, status = os.waitpid(self.child, 0)
        assert status == 0, f"exit status {status}"
        return json.loads(said)


def apart(work: Callable[[], object]) -> Any:
    """What `work` returns when it is run in a process of its own."""
    return Answer(work).get()
