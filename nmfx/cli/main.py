"""The `nmfx` command: its arguments, and what becomes of errors."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from argparse import Namespace
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module

from nmfx import __version__
from nmfx.cli.commands import COMMANDS, EPILOG, parser
from nmfx.errors import NmfxError
from nmfx.settings.flags import Parser
from nmfx.text import sentence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 for an error, 2 for wrong usage, 130 when interrupted."""
    whole = parser()
    args = whole.read(argv)
    if args.command is None:
        return _without_command(whole, args.completion)
    logging.basicConfig(level=logging.DEBUG if args.verbose else logging.ERROR, format="%(name)s: %(message)s")
    if not args.verbose:
        warnings.simplefilter("ignore")  # of the model libraries; ours are said in plain words
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # bars on a terminal without them
    try:
        command = import_module(f"nmfx.cli.{COMMANDS[args.command].module or args.command}")
        with _alone(args):
            command.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted; nothing half-written", file=sys.stderr)  # noqa: T201
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if args.verbose:
            raise
        from nmfx.cli.console import warn  # not for `--help`: it takes time

        warn(_said(error), "error")
        return 1
    return 0


def _alone(args: Namespace) -> AbstractContextManager[None]:
    """Around a command: where it shows JSON, nothing else is on standard output."""
    if not vars(args).get("json"):
        return nullcontext()
    from nmfx.cli.console import only_json  # not for `--help`: it takes time

    return only_json()


def _without_command(whole: Parser, shell: str | None) -> int:
    """The tour, or what completes commands in a shell."""
    if shell is None:
        last = "`nmfx --help` lists the commands, `nmfx COMMAND --help` what each takes"
        print(f"nmfx {__version__}: {whole.description}\n\n{EPILOG}\n{last}")  # noqa: T201
        return 0
    try:
        import shtab
    except ImportError:
        print("error: completion needs shtab: pip install 'nmfx[completion]'", file=sys.stderr)  # noqa: T201
        return 1
    for one in (whole, *whole.commands().values()):
        for action in one._actions:
            words = action.metavar if isinstance(action.metavar, str) else ""
            if "FILE" in words or "DIR" in words or words in ("PATH", "RECIPE", "SCHEME"):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(whole, shell))  # noqa: T201
    return 0


def _said(error: Exception) -> str:
    """An error in one line: ours as it is, the system's with its file, and what nobody foresaw with the way to see more."""
    if isinstance(error, NmfxError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"unexpected {type(error).__name__}: {sentence(error)}; the same with `nmfx -v` in front shows where"
