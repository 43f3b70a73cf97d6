"""Record a command's terminal output as docs/search.svg: python benchmarks/terminal.py"""

from __future__ import annotations

import io
import os
import tempfile
from pathlib import Path

from rich.console import Console

from nmfx.cli import console, convert, search
from nmfx.cli.main import main

DOCS = Path(__file__).parents[1] / "docs"
COMMAND = ["search", "--target", "0.875", "--method", "domino"]


def record() -> str:
    """The output of COMMAND on the demo network, after its conversion, as an SVG of 88 columns."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        main(["convert", "demo:digits"])
        recorder = Console(record=True, width=88, force_terminal=True, highlight=False, file=io.StringIO())
        for module in (console, convert, search):
            module.output = lambda: recorder
        main(COMMAND)
        return recorder.export_svg(title="nmfx " + " ".join(COMMAND))


if __name__ == "__main__":
    (DOCS / "search.svg").write_text(record())
