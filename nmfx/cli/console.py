"""The consoles: standard output for results, standard error for progress, warnings and errors."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

PIPED_WIDTH = 160  # no terminal to fit: names stay whole


@cache
def output() -> Console:
    """Where results go. Without markup: names and paths may hold square brackets."""
    from nmfx.cli.terminal import Terminal

    class Piped(Terminal):
        def on_broken_pipe(self) -> None:
            """The reader has gone, as `| head` does: go on in silence, since what is written to disk is still wanted."""
            self.quiet = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Piped(width=PIPED_WIDTH if piped else None, highlight=False, markup=False)


def heading(bold: str, rest: str = "", style: str = "bold") -> Text:
    """A line whose first words stand out."""
    from rich.text import Text

    return Text.assemble((bold, style), rest)


@cache
def errors() -> Console:
    """Where everything else goes."""
    from nmfx.cli.terminal import Terminal

    return Terminal(stderr=True, highlight=False)


def warn(text: str, *, red: bool = False) -> None:
    """One line on standard error that the user should not miss."""
    from rich.markup import escape

    color = "bold red" if red else "yellow"
    errors().print(f"[{color}]{'warning' if not red else 'WARNING'}:[/] {escape(text)}", soft_wrap=True)


def hint(first: tuple[str, str], *others: tuple[str, str]) -> None:
    """Commands to go on with, and what each does; they can be run as they stand."""
    width = max(len(command) for command, _ in (first, *others))
    for word, (command, what) in zip(("next: ", *["  or: "] * len(others)), (first, *others), strict=True):
        output().print(f"{word}{command:<{width}}  {what}" if what else f"{word}{command}", soft_wrap=True)


@contextlib.contextmanager
def working(text: str) -> Iterator[None]:
    """A progress line with the time elapsed while something takes long; nothing when piped."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=errors(), transient=True, disable=not errors().is_terminal) as progress:
        progress.add_task(text, total=None)
        yield


@contextlib.contextmanager
def advancing(text: str) -> Iterator[Callable[[float, str], None]]:
    """A progress bar; what it yields takes the share done and a line of text. Nothing when piped."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(24), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors(), transient=True, disable=not errors().is_terminal) as progress:
        task = progress.add_task(text, total=1.0)
        yield lambda share, line: progress.update(task, completed=share, description=line or text)


def silence() -> None:
    """Say nothing from now on: another process speaks."""
    output().quiet = errors().quiet = True
