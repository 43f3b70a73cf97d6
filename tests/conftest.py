"""Every test starts from the same seed, on one thread, and leaves the user's caches alone.

Measured times are of this run.
"""

from __future__ import annotations

import atexit
import math
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

def pytest_configure(config: pytest.Config) -> None:
    """Before anything of nmfx runs: a cache folder of this process, which those that it starts inherit."""
    folder = Path(tempfile.mkdtemp(prefix="nmfx-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["NMFX_CACHE"] = str(folder / "cache")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def quick_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time everything once, and let the pace of a busy machine change as it likes: no law hangs on a clock."""
    from nmfx.runtime import compiler
    from nmfx.runtime.measuring import choices, latency, timing

    monkeypatch.setattr(timing, "ROUNDS", 1)
    monkeypatch.setattr(timing, "TURN_SECONDS", 0.0)
    monkeypatch.setattr(timing, "QUICK_SECONDS", 0.0)
    monkeypatch.setattr(timing, "CHANGED", math.inf)
    for module in (compiler, latency):
        monkeypatch.setattr(module, "NETWORK_SECONDS", 0.0)
    monkeypatch.setattr(choices, "TILES", choices.TILES[::5])  # of every kind; all of them are built in test_kernel
    monkeypatch.setattr(choices, "REPEATS", 2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes comes first, so that no worker waits for it at the end."""
    items.sort(key=lambda item: "with_sanitizers" not in item.name)
