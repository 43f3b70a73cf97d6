"""Running an example as a reader would: from the repository's root, in a process of its own, warnings being errors."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def example() -> Callable[..., str]:
    """``example("digits.py", "--epochs", 6)``: what the script prints."""

    def run(script: str, *options: object) -> str:
        command = [sys.executable, "-W", "error", f"examples/{script}", *map(str, options)]
        environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "FORCE_COLOR")} | {"PYTHONPATH": str(ROOT)}
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
        assert run.returncode == 0, run.stderr
        return run.stdout

    return run
