"""A command line: arguments and flags of settings classes, made from their options and read back by the parser of YAML keys."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

from nmfx.errors import NmfxError
from nmfx.settings.option import (
    Option,
    about,
    check_given,
    is_mapping,
    is_settings,
    kinds_of,
    options_of,
    parse,
    start_from,
    typed_fields,
    with_names,
)
from nmfx.text import nearest

T = TypeVar("T")
Path = tuple[str, ...]  # the keys on the way to an option
Part = Callable[[Any], object]  # adds what a command takes to its parser, or to a group of it


class Parser(argparse.ArgumentParser):
    """An error is one line, and a second one on where the options are; what is misspelt is answered with the nearest."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        if (found := re.match(r"argument COMMAND: invalid choice: '?([^'( ]*)'?", message)) is not None:
            message = f"no command is called {found[1]!r}{nearest(found[1], self.commands(), 0.5)}"
        self.exit(2, f"error: {' '.join(message.split())}\nusage: {self.prog} ...; `{self.prog} --help` lists what it takes\n")

    def read(self, args: Sequence[str] | None = None) -> argparse.Namespace:
        """As `parse_args`; what is not known is named by the parser of the command that was given."""
        found, rest = self.parse_known_args(args)
        if rest:
            parser, option = self.commands().get(found.command, self), rest[0].partition("=")[0]
            near = nearest(option, parser._option_string_actions) if option.startswith("-") else ""
            parser.error(f"unknown argument {rest[0]!r}{near}")
        return found

    def commands(self) -> dict[str, Parser]:
        """The parsers of the commands, by name."""
        return next(action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction))


def arg(*names: str, **about: Any) -> Part:
    """An argument, in argparse's words."""
    return lambda parser: parser.add_argument(*names, **about)


def flags(cls: type, **which: Any) -> Part:
    """The flags of a settings class (see `add_flags`)."""
    return lambda parser: add_flags(parser, cls, **which)


def group(title: str, *parts: Part) -> Part:
    """Arguments under a title; without one, those of which one may be given."""

    def add(parser: argparse.ArgumentParser) -> None:
        inner = parser.add_argument_group(title) if title else parser.add_mutually_exclusive_group()
        for part in parts:
            part(inner)

    return add


def add_flags(
    parser: Any, cls: type, *, only: Container[str] = (), without: Container[str] = (), required: bool = True
) -> None:
    """Add the flags of a settings class to a parser or one of its groups.

    Args:
        only: the keys that get a flag here, if not all.
        without: keys that get none.
        required: flags without a default have to be typed.
    """
    for item, kind, path in _flagged(cls):
        if any(key in without for key in path) or (only and not any(key in only for key in path)):
            continue
        said, kinds = about(item), kinds_of(kind)
        default = None if item.default is MISSING else item.default
        options: dict[str, Any] = {"dest": _dest(cls, path), "default": argparse.SUPPRESS, "help": _help(said, default)}
        options |= {"required": True} if required and item.default is MISSING else {}
        if bool in kinds:
            options |= {"action": "store_const", "const": "false" if item.default is True else "true"}
        elif said.const and get_origin(kind) is Literal:
            options |= {"action": "store_const", "const": said.const}
        else:
            options["metavar"] = said.metavar or _metavar(kinds)
            options |= {"nargs": "?", "const": said.const} if said.const else {}
            options |= {"action": "append"} if said.repeat else {}
            options["type"] = _checked(item, kind, said)
        parser.add_argument(name_of(item), **options)


def read_flags(args: argparse.Namespace, cls: type[T], **given: Any) -> T:
    """The settings that the flags of a command say; what was not typed has its default, or what is `given`.

    Raises:
        NmfxError: two options that do not go together.
    """
    found = {path: (vars(args).get(_dest(cls, path)), item, kind) for item, kind, path in _flagged(cls)}
    try:
        settings = _build(cls, {path: _value(*one) for path, one in found.items() if one[0] is not None}, (), given)
        return check_given(settings, typed(args, cls))
    except NmfxError as error:  # of a key: say the flag
        names = {key: name_of(item) for key, (item, _) in options_of(cls).items()}
        first, rest = re.match(r"(\w*)(.*)", with_names(str(error), names), re.DOTALL).groups()  # type: ignore[union-attr]
        raise type(error)(f"{names.get(first, first) if rest.startswith(' ') else first}{rest}") from None


def typed(args: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The keys whose flags were typed, with what was."""
    texts = {path[-1]: vars(args).get(_dest(cls, path)) for _, _, path in _flagged(cls)}
    return {key: text for key, text in texts.items() if text is not None}


def _dest(cls: type, path: Path) -> str:
    return ".".join((cls.__name__, *path))


def name_of(item: Field[Any]) -> str:
    """The flag of an option, as ``--batch-size``."""
    return f"--{(about(item).flag or item.name).replace('_', '-')}"


def _build(cls: type[T], values: Mapping[Path, Any], path: Path, given: Mapping[str, Any], base: Any = None) -> T:
    if base is None and (choose := getattr(cls, "base", None)) is not None:
        base = choose({path[-1]: value for path, value in values.items()})
    found = start_from(base) | dict(given)
    for item, kind, said in typed_fields(cls):
        here = path if said.inline else (*path, item.name)
        if is_settings(kind) and item.name not in given:
            found[item.name] = _build(kind, values, here, {}, found.get(item.name))
        elif (*path, item.name) in values:
            found[item.name] = values[(*path, item.name)]
    return cls(**found)


def _flagged(cls: type, path: Path = (), without: tuple[str, ...] = ()) -> Iterator[tuple[Field[Any], Any, Path]]:
    for item, kind, said in typed_fields(cls):
        if said.flag is None or item.name in without:
            continue
        if is_settings(kind):
            yield from _flagged(kind, path if said.inline else (*path, item.name), said.without)
        else:
            yield item, kind, (*path, item.name)


def _metavar(kinds: tuple[Any, ...]) -> str:
    if any(get_origin(kind) is Literal for kind in kinds):
        return "|".join(word for kind in kinds for word in get_args(kind))
    if any(get_origin(kind) is tuple for kind in kinds):
        return "N,N,..."
    return {int: "N", float: "X", str: "TEXT"}.get(kinds[0], "TEXT")


def _help(said: Option, default: Any) -> str:
    """What `--help` says of an option, with its default."""
    said_help = f"without {said.help}" if said.flag and said.flag.startswith("no-") else said.help
    word = f"{default:g}" if isinstance(default, float) else str(default)
    hidden = default is None or isinstance(default, bool | tuple) or word == "" or said.repeat or bool(said.const)
    return (said_help + ("; repeatable" if said.repeat else "") + ("" if hidden else f" (default: {word})")).replace("%", "%%")


def _checked(item: Field[Any], kind: Any, said: Option) -> Any:
    """Text that `_value` will take, or argparse's own error."""

    def check(text: str) -> str:
        try:
            _value([text] if said.repeat else text, item, kind)
        except NmfxError as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix(name_of(item)).lstrip(".: ")) from None
        return text

    return check


def _value(typed: Any, item: Field[Any], kind: Any) -> Any:
    """What was typed as the value of an option; texts with commas are lists, NAME=VALUE are entries of a mapping."""
    said, kinds = about(item), kinds_of(kind)
    tree: Any = typed
    if any(map(is_mapping, kinds)):
        pairs = [text.rpartition("=") for text in typed]
        for text, (name, equals, value) in zip(typed, pairs, strict=True):
            if not value or (bool(name) != bool(equals)) or not (equals or float in kinds):
                raise NmfxError(f"{name_of(item)} {text}: expected a name and a value, as in {said.metavar}")
        pairs.sort(key=lambda pair: not pair[0])  # the first match counts: what is said of all sites comes last
        tree = {name or "*": value for name, _, value in pairs}
        if len(tree) < len(pairs):
            raise NmfxError(f"{name_of(item)} {f' {name_of(item)} '.join(typed)}: one of a kind")
    elif (several := [kind for kind in kinds if get_origin(kind) is tuple]) and not said.repeat:
        tree = typed.split(",")
        if get_args(several[0])[0] is int and not all(re.fullmatch(r"-?\d+", part) for part in tree):
            raise NmfxError(f"{name_of(item)}: expected whole numbers with commas, as in 1,2,4,8, found {typed!r}")
        tree = tree[0] if len(tree) == 1 and int in kinds else tree
    return parse(tree, kind, name_of(item), said)
