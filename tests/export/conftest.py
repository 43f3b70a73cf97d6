"""The command line in a folder of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nmfx.cli import console
from nmfx.cli.main import main


@pytest.fixture
def nmfx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command in an empty folder: its output, or its error where it `fails`."""
    monkeypatch.chdir(tmp_path)
    console.output.cache_clear()

    def run(*argv: str, fails: bool = False) -> str:
        assert main(argv) == (1 if fails else 0), capsys.readouterr().err
        said = capsys.readouterr()
        return said.err if fails else said.out

    return run
