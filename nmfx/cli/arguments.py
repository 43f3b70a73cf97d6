"""How arguments are read: errors of two lines, with the nearest name."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import NoReturn

from nmfx.text import nearest


class Parser(argparse.ArgumentParser):
    """An error is one line, and a second one on where the options are; what is misspelt is answered with the nearest."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        if (found := re.match(r"argument COMMAND: invalid choice: '?([^'( ]*)'?", message)) is not None:
            message = f"no command is called {found[1]!r}{nearest(found[1], self._commands(), 0.5)}"
        self.exit(2, f"error: {' '.join(message.split())}\nusage: {self.prog} ...; `{self.prog} --help` lists what it takes\n")

    def read(self, args: Sequence[str] | None = None) -> argparse.Namespace:
        """As `parse_args`; what is not known is named by the parser of the command that was given."""
        found, rest = self.parse_known_args(args)
        if rest:
            parser, option = self._commands()[found.command], rest[0].partition("=")[0]
            near = nearest(option, parser._option_string_actions) if option.startswith("-") else ""
            parser.error(f"unknown argument {rest[0]!r}{near}")
        return found

    def _commands(self) -> dict[str, Parser]:
        return next(action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction))
