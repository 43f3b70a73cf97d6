"""The consoles: standard output for results, standard error for progress, warnings and errors."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.text import Text

from nmfx.processes import asked_to_stop, rank
from nmfx.text import printable

PIPED_WIDTH = 160  # no terminal to fit: names stay whole
PIPED_SECONDS, FIRST_SECONDS = 30.0, 2.0  # between two lines of progress where there is no bar, and before the first


class Terminal(Console):
    """rich's, but no byte of a name, a file or a message moves the cursor, colours, or breaks the output's encoding."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The segments of anything that is printed; those that are rich's own control codes stay."""
        for segment in super().render(renderable, options):
            words = segment.text
            if not segment.control and not words.isprintable():
                segment = segment._replace(text="\n".join(map(printable, words.split("\n"))))
            yield segment

    def on_broken_pipe(self) -> None:
        """The reader has gone, as `| head` does: go on in silence, since what is written to disk is still wanted."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


@cache
def output() -> Console:
    """Where results go. Without markup: names and paths may hold square brackets."""
    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Terminal(width=PIPED_WIDTH if piped else None, highlight=False, markup=False)


@cache
def errors() -> Console:
    """Where everything else goes."""
    return Terminal(stderr=True, highlight=False)


@contextlib.contextmanager
def only_json() -> Iterator[None]:
    """Say nothing on standard output but what `show_json` shows there."""
    output().quiet = True
    try:
        yield
    finally:
        output().quiet = False


def show_json(values: Any) -> None:
    """Plain values as JSON, alone on standard output, for a program that reads it."""
    if rank() == 0:
        output().file.write(json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def heading(bold: str, rest: str = "", style: str = "bold") -> Text:
    """A line whose first words stand out."""
    return Text.assemble((bold, style), rest)


def warn(text: str, word: str = "warning") -> None:
    """One line on standard error that the user should not miss, in red where it is more than a ``warning``."""
    errors().print(f"[{'yellow' if word == 'warning' else 'bold red'}]{word}:[/] {escape(text)}", soft_wrap=True)


def hint(first: tuple[str, str], *others: tuple[str, str]) -> None:
    """Commands to go on with, and what each does; they can be run as they stand."""
    width = max(len(command) for command, _ in (first, *others))
    for word, (command, what) in zip(("next: ", *["  or: "] * len(others)), (first, *others), strict=True):
        output().print(f"{word}{command:<{width}}  {what}" if what else f"{word}{command}", soft_wrap=True)


@contextlib.contextmanager
def advancing(text: str, *, resumable: bool = False) -> Iterator[Callable[..., None]]:
    """A progress bar; what it yields takes the share done and a line of text, which stays there with ``lasting=True``. Until it
    is told of a share, the bar only shows that something goes on.

    When piped there is no bar: lines that last go to standard output, and of the others one after `FIRST_SECONDS` and one every
    `PIPED_SECONDS` to standard error, each at once. Of what can be resumed, Ctrl-C waits for the next step, so that nothing is
    lost.
    """
    waiting = asked_to_stop() if resumable else contextlib.nullcontext(lambda: None)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(24), TimeElapsedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=errors(), transient=True, disable=not errors().is_terminal)
    with bar as progress, waiting as stop:
        task, due = progress.add_task(text, total=None), time.monotonic() + FIRST_SECONDS

        def advance(share: float, line: str = "", *, lasting: bool = False) -> None:
            nonlocal due
            if not lasting:
                stop()
            if lasting:  # above the bar, unless standard output goes elsewhere
                above = output().is_terminal and errors().is_terminal
                (progress.console if above else output()).print(line, markup=False, highlight=False, soft_wrap=True)
            elif errors().is_terminal:
                progress.update(task, total=1.0 if share else None, completed=share, description=line or text)
            elif time.monotonic() >= due:
                errors().print(f"{share:.1%} done: {line or text}", markup=False, highlight=False, soft_wrap=True)
                due = time.monotonic() + PIPED_SECONDS

        yield advance
