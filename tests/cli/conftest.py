"""Every command runs in a new folder, on consoles that write to what pytest captures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nmfx.cli import console
from nmfx.cli.main import main


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A new current folder, and consoles that write to what pytest captures."""
    monkeypatch.chdir(tmp_path)
    for name in ("COLUMNS", "FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for function in (console.output, console.errors):
        function.cache_clear()
    yield tmp_path
    for function in (console.output, console.errors):
        function.cache_clear()


@pytest.fixture
def nmfx(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that works; its output."""

    def run(*argv: str) -> str:
        assert main(argv) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run
