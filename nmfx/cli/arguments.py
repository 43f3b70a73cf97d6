"""How arguments are read: errors of two lines, with the nearest name, and whole numbers with their limits."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Sequence
from typing import NoReturn

from nmfx.errors import NmfxError
from nmfx.settings.option import Option, parse


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


def whole(least: int, most: int) -> Callable[[str], int]:
    """A whole number within limits, for an argument that is no option of settings."""

    def read(text: str) -> int:
        try:
            number: int = parse(text, int, "", Option(least=least, most=most))
        except NmfxError as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix(": ")) from None
        return number

    return read
