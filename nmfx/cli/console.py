"""The consoles: standard output for results, standard error for progress, warnings and errors."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

PIPED_WIDTH = 160  # no terminal to fit: names stay whole
PIPED_SECONDS = 30.0  # between two lines of progress where there is no bar


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
def advancing(text: str) -> Iterator[Callable[..., None]]:
    """A progress bar; what it yields takes the share done and a line of text, which stays there with ``lasting=True``.

    When piped there is no bar: lines that last go to standard output, and one of the others every `PIPED_SECONDS` to standard
    error, each at once.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(24), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors(), transient=True, disable=not errors().is_terminal) as progress:
        task, said = progress.add_task(text, total=1.0), time.monotonic()

        def advance(share: float, line: str, *, lasting: bool = False) -> None:
            nonlocal said
            if lasting:  # above the bar, unless standard output goes elsewhere
                above = output().is_terminal and errors().is_terminal
                (progress.console if above else output()).print(line, markup=False, highlight=False, soft_wrap=True)
            elif errors().is_terminal:
                progress.update(task, completed=share, description=line or text)
            elif time.monotonic() - said >= PIPED_SECONDS:
                errors().print(f"{share:.1%} done: {line or text}", markup=False, highlight=False, soft_wrap=True)
                said = time.monotonic()

        yield advance


def silence() -> None:
    """Say nothing from now on: another process speaks."""
    output().quiet = errors().quiet = True
