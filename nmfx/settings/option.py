"""What an option is, and text as its value: the one parser behind YAML keys and flags.

A settings class is a frozen dataclass whose fields are made by `option`. Its values come from three sides: Python's keyword
arguments (`check_options` looks at their types and limits), a section of a YAML file (`section`), flags (`nmfx.settings.flags`,
which bring what was typed into the same form). jsonargparse (0.43 s to import), pydantic-settings (0.50 s) and tyro (0.23 s)
were tried: none reads YAML 1.2 numbers, which ``2:4`` needs, or gives one error for a key and its flag.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from nmfx import text
from nmfx.errors import NmfxError
from nmfx.files import parsing
from nmfx.sparsity.pattern import Pattern

INT = re.compile(r"[-+]?\d{1,18}", re.ASCII)
NUMBER = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?", re.ASCII)
TRUTH = {"true": True, "false": False}
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Pattern: "a pattern such as 2:4"}
LARGEST = 2**31 - 1  # of whole numbers with no smaller limit
T = TypeVar("T")


@dataclass(frozen=True)
class Option:
    """What is said of a field beside its type and default.

    Attributes:
        help: one line for `--help` and the reference page, with the unit.
        least, most: limits of a number; `above` and `below` leave the limit itself out.
        flag: the flag's name where it is not the field's, as ``no-augment``; None: it has none.
        metavar: what stands for the value in `--help`.
        const: the value of a flag that is given without one.
        repeat: a flag that may be given several times, one entry of a list or mapping each.
        inline: the field is a settings class itself, and its options stand beside those around it.
        without: options of an inline class that are left out, as others give them.
        free: it changes no result: a stopped run may go on with another value.
    """

    help: str = ""
    least: float = -math.inf
    most: float = math.inf
    above: bool = False
    below: bool = False
    flag: str | None = ""
    metavar: str = ""
    const: str = ""
    repeat: bool = False
    inline: bool = False
    without: tuple[str, ...] = ()
    free: bool = False

    def limits(self, whole: bool) -> str:
        """The limits in words, empty where there are none."""
        most = LARGEST if whole and self.most == math.inf else self.most
        if self.least == -math.inf:
            return ""
        if whole:
            return f"{self.least:g} or more" if most == LARGEST else f"{self.least:g} to {int(most)}"
        upper = "" if most == math.inf else f" and {'below' if self.below else 'at most'} {most:g}"
        return f"{f'above {self.least:g}' if self.above else f'{self.least:g} or more'}{upper}"

    def allows(self, number: float) -> bool:
        """Whether a number is finite and within the limits."""
        low = number > self.least if self.above else number >= self.least
        high = number < self.most if self.below else number <= self.most
        return math.isfinite(number) and low and high


def option(default: Any = MISSING, help: str = "", **about: Any) -> Any:
    """A field of a settings class; `about` are attributes of `Option`."""
    return field(default=default, metadata={"option": Option(help, **about)})


def inline(default: Any, *without: str) -> Any:
    """A field whose own options stand beside those of the class around it, but those that are named."""
    return field(default=default, metadata={"option": Option(inline=True, without=without)})


def about(item: Field[Any]) -> Option:
    """The option that a field is."""
    said: Option = item.metadata.get("option", Option())
    return said


def typed_fields(cls: type) -> list[tuple[Field[Any], Any, Option]]:
    """The fields of a settings class, each with its type and its option."""
    kinds = get_type_hints(cls)
    return [(item, kinds[item.name], about(item)) for item in fields(cls)]


def kinds_of(kind: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def is_settings(kind: Any) -> bool:
    """Whether a type is a settings class."""
    return isinstance(kind, type) and is_dataclass(kind) and kind is not Pattern


def is_mapping(kind: Any) -> bool:
    """Whether a type is a mapping from names."""
    return get_origin(kind) is Mapping


def options_of(cls: type, without: Iterable[str] = ()) -> dict[str, tuple[Field[Any], Any]]:
    """The options of a settings class by their keys, with their types; those of inline classes among them."""
    found: dict[str, tuple[Field[Any], Any]] = {}
    for item, kind, said in typed_fields(cls):
        found |= options_of(kind, said.without) if said.inline else {item.name: (item, kind)}
    return {key: one for key, one in found.items() if key not in without}


def values_of(settings: Any, without: Iterable[str] = ()) -> dict[str, Any]:
    """The values of a settings object by the keys of its options; those of inline classes among them."""
    found: dict[str, Any] = {}
    for item in fields(settings):
        value = getattr(settings, item.name)
        found |= values_of(value, about(item).without) if about(item).inline else {item.name: value}
    return {key: value for key, value in found.items() if key not in without}


def free_keys(cls: type) -> list[str]:
    """The keys of options that change no result."""
    return [key for key, (item, _) in options_of(cls).items() if about(item).free]


def check_options(settings: Any, what: str, error: type[NmfxError] = NmfxError) -> None:
    """Check numbers against their types and limits, and words against those that are known.

    Args:
        what: the settings, as ``fine-tuning settings``.

    Raises:
        NmfxError: of type `error`, naming the first option that is wrong.
    """
    for item, kind, said in typed_fields(type(settings)):
        value, kinds = getattr(settings, item.name), kinds_of(kind)
        if value is None and NoneType in kinds:
            continue
        where = f"{what}: {item.name}={value!r}"
        if get_origin(kind) is Literal and value not in get_args(kind):
            raise error(f"{where}: expected one of {', '.join(get_args(kind))}")
        if not {int, float} & set(kinds) or not set(kinds) <= {int, float, NoneType}:
            continue
        whole = float not in kinds
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            raise error(f"{where}: expected {WORDS[int if whole else float]}")
        if not said.allows(value):
            raise error(f"{where}: expected {_limited(WORDS[int if whole else float], said, whole)}")


def section(tree: Any, cls: type[T], where: str, base: Any = None) -> T:
    """Keys with texts, lists and mappings, as YAML gives them, as a value of the settings class `cls`.

    Args:
        where: the file, and the keys on the way to it.
        base: has the values of what is not said, if that is not the default; a class may choose one by its ``base``.

    Raises:
        NmfxError: an unknown key with the nearest known one, a key that is missing, a text of another type, a number out of its
            limits.
    """
    tree = {} if tree == "" else tree  # a key with nothing behind it
    if not isinstance(tree, dict):
        raise NmfxError(f"{where}: expected keys with values, found {shown(tree)}")
    known = options_of(cls)
    text.check_keys(tree, list(known), where, NmfxError)
    if base is None and (choose := getattr(cls, "base", None)) is not None:
        base = choose(tree)
    values, separator = start_from(base), ": " if getattr(cls, "is_whole", False) else "."
    for item, kind, said in typed_fields(cls):
        if said.inline:
            own = {key: value for key, value in tree.items() if key in options_of(kind, said.without)}
            values[item.name] = section(own, kind, where, values.get(item.name))
        elif item.name in tree and is_settings(kind):
            values[item.name] = section(tree[item.name], kind, f"{where}{separator}{item.name}", values.get(item.name))
        elif item.name in tree:
            values[item.name] = parse(tree[item.name], kind, f"{where}{separator}{item.name}", said)
        elif base is None and item.default is MISSING and item.default_factory is MISSING:
            raise NmfxError(f"{where}: key {item.name!r} is missing")
    try:
        return check_given(cls(**values), tree)
    except NmfxError as error:
        names = {key: f"'{key}: true'" if kind is bool and key not in tree else f"'{key}'" for key, (_, kind) in known.items()}
        raise NmfxError(f"{where}: {parsing.printable(with_names(str(error), names))}") from error


def check_given(settings: T, given: Collection[str]) -> T:
    """Settings of which the keys that were `given` go together, if their class has a method to say so."""
    if (check := getattr(settings, "check_given", None)) is not None:
        check(given)
    return settings


def with_names(message: str, names: Mapping[str, str]) -> str:
    """A message of settings, with the options that it names in backticks called as by whoever gave them."""
    return re.sub(r"`(\w+)`", lambda found: names.get(found[1], found[0]), message)


def start_from(base: Any) -> dict[str, Any]:
    """The values of a settings object by field; none of None."""
    return {} if base is None else {item.name: getattr(base, item.name) for item in fields(base)}


def parse(value: Any, kind: Any, where: str, said: Option = Option()) -> Any:
    """Texts, lists and mappings as a value of `kind`, a type as fields have them.

    Raises:
        NmfxError: it is none, or a number out of the limits that are `said`.
    """
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return plain(value)
    if origin in (Union, UnionType):
        if value == "false" and NoneType in args and any(map(is_settings, args)):
            return None  # a section that is left out
        return _one_of(value, [arg for arg in args if arg is not NoneType], where, said)
    if origin is Literal:
        if value not in args:
            near = text.nearest(value, args) if isinstance(value, str) else ""
            raise NmfxError(f"{where}: expected one of {', '.join(args)}, found {shown(value)}{near}")
        return value
    if is_settings(kind):
        return section(value, kind, where)
    if is_mapping(kind):
        if not isinstance(value, dict):
            raise NmfxError(f"{where}: expected names with values, found {shown(value)}")
        return {key: parse(each, args[1], f"{where}.{key}") for key, each in value.items()}
    if origin is not None:
        return _several(value, origin, args, where)
    return _scalar(value, kind, where, said)


def plain(value: Any) -> Any:
    """What YAML 1.2 takes a text for when nothing is known of it."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    if INT.fullmatch(value):
        return int(value)
    return TRUTH[value] if value in TRUTH else float(value) if _is_number(value) else value


def shown(value: Any) -> str:
    """What was found instead, for an error."""
    if isinstance(value, str):
        return parsing.printable(repr(value), 100)
    return f"a {'list' if isinstance(value, list) else 'mapping'}"


def _limited(what: str, said: Option, whole: bool) -> str:
    limits = said.limits(whole)
    return f"{what}, {limits}" if limits else what


def _several(value: Any, origin: Any, args: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    length = len(args) if origin is tuple and args[-1] is not Ellipsis else None
    if not isinstance(value, list) or (length is not None and len(value) != length):
        raise NmfxError(f"{where}: expected a list{f' of {length}' if length else ', as [a, b]'}, found {shown(value)}")
    return tuple(parse(each, args[0], f"{where}[{index}]") for index, each in enumerate(value))


def _one_of(value: Any, kinds: Sequence[Any], where: str, said: Option) -> Any:
    """The first of `kinds` that a value is; the last one's complaint when it is none of them."""
    errors = []
    for kind in kinds:
        try:
            return parse(value, kind, where, said)
        except NmfxError as error:
            errors.append(error)
    keyed = [is_settings(kind) or is_mapping(kind) for kind in kinds]
    fitting = [error for error, one in zip(errors, keyed, strict=True) if isinstance(value, dict) == one]
    raise (fitting or errors)[-1]


def _scalar(value: Any, kind: type, where: str, said: Option) -> Any:
    whole = kind is int
    wrong = NmfxError(f"{where}: expected {_limited(WORDS[kind], said, whole)}, found {shown(value)}")
    if not isinstance(value, str):
        raise wrong
    if kind is Pattern:
        try:
            return Pattern.DENSE if value == "dense" else Pattern(value)
        except NmfxError as error:
            raise NmfxError(f"{where}: {error}") from error
    if kind is bool:
        if value not in TRUTH:
            raise wrong
        return TRUTH[value]
    if (whole and not INT.fullmatch(value)) or (kind is float and not _is_number(value)):
        raise wrong
    if kind in (int, float) and not said.allows(kind(value)):
        raise wrong
    return kind(value)


def _is_number(value: str) -> bool:
    return bool(NUMBER.fullmatch(value)) and math.isfinite(float(value))
