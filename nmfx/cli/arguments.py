"""How arguments are read: numbers with their limits, errors of two lines, options that every command shares."""

from __future__ import annotations

import argparse
import difflib
import math
import re
from collections.abc import Callable, Sequence
from typing import NoReturn

MOST = 2**31 - 1  # of whole numbers that no smaller limit is known for


class Parser(argparse.ArgumentParser):
    """An error is one line, and a second one on where the options are; what is misspelt is answered with the nearest."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        known = {name: "" for action in self._actions for name in (action.choices or ()) if isinstance(name, str)}
        if (found := re.match(r"argument COMMAND: invalid choice: '?([^'( ]*)'?", message)) is not None:
            near = difflib.get_close_matches(found[1], known, n=1, cutoff=0.5)
            message = f"no command is called {found[1]!r}" + (f" (did you mean {near[0]!r}?)" if near else "")
        self.exit(2, f"error: {' '.join(message.split())}\nusage: {self.prog} ...; `{self.prog} --help` lists what it takes\n")

    def read(self, args: Sequence[str] | None = None) -> argparse.Namespace:
        """As `parse_args`; what is not known is named by the parser of the command that was given."""
        found, rest = self.parse_known_args(args)
        if rest:
            commands = next((a.choices for a in self._actions if isinstance(a, argparse._SubParsersAction)), {})
            parser = commands.get(getattr(found, "command", ""), self)
            option = rest[0].partition("=")[0]
            near = difflib.get_close_matches(option, parser._option_string_actions, n=1) if option.startswith("-") else []
            parser.error(f"unknown argument {rest[0]!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
        return found


def whole(least: int = 1, most: int = MOST) -> Callable[[str], int]:
    """A whole number within limits."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if not least <= number <= most:
            limits = f"{least} or more" if most == MOST and number < least else f"{least} to {most}"
            raise argparse.ArgumentTypeError(f"expected a whole number, {limits}, found {text!r}")
        return number

    return parse


def real(least: float = 0.0, most: float = math.inf, *, above: bool = False, below: bool = False) -> Callable[[str], float]:
    """A finite number within limits; `above` and `below` leave the limit itself out."""

    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        low = number > least if above else number >= least
        high = number < most if below else number <= most
        if not (math.isfinite(number) and low and high):
            lower = f"above {least:g}" if above else f"{least:g} or more"
            upper = "" if most == math.inf else f" and {'below' if below else 'at most'} {most:g}"
            raise argparse.ArgumentTypeError(f"expected a number, {lower}{upper}, found {text!r}")
        return number

    return parse


seed = whole(0, 2**32 - 1)
workers = whole(0, 256)


def shared() -> Parser:
    """What every command takes."""
    parser = Parser(add_help=False)
    suppressed = argparse.SUPPRESS  # what was said before the command stays
    parser.add_argument(
        "-v", "--verbose", action="store_true", default=suppressed, help="log what the library does, show tracebacks"
    )
    return parser


def add_strict(parser: argparse.ArgumentParser) -> None:
    """The option that makes random weights an error."""
    parser.add_argument(
        "--strict-weights",
        action="store_true",
        help="random weights are an error, not a warning (as with NMFX_STRICT_WEIGHTS=1 in the environment)",
    )
