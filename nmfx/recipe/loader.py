"""A YAML file as a Recipe: every key known, every text parsed by the type of its field (YAML 1.2 numbers), once, here."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import nmfx
from nmfx import text
from nmfx.errors import NmfxError
from nmfx.files import parsing
from nmfx.recipe.schema import INLINE, Recipe, SearchSection
from nmfx.search.domino_loop import Loop
from nmfx.sparsity.pattern import Pattern

HOME = Path(nmfx.__file__).parent
PACKAGED = (HOME / "recipes", HOME.parent / "recipes")  # installed; in the repository
ALONE = {"scheme": (), "pattern": ("keep_dense", "layout", "remainder")}  # keys that a search by neither can have beside them
WHOLE = re.compile(r"[-+]?\d{1,18}", re.ASCII)
NUMBER = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?", re.ASCII)
TRUTH = {"true": True, "false": False}
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Pattern: "a pattern such as 2:4"}
T = TypeVar("T")


def packaged_recipes() -> dict[str, Path]:
    """The recipes that come with nmfx, by name."""
    folder = next((folder for folder in PACKAGED if folder.is_dir()), PACKAGED[0])
    return dict(sorted((path.name.removesuffix(".yaml"), path) for path in folder.glob("*.yaml")))


def find_recipe(name: str | Path, *, beside: Path | None = None) -> Path:
    """The file of a recipe: a path, a name `beside` another recipe, or the name of one that comes with nmfx.

    Raises:
        NmfxError: there is none; the message lists the names.
    """
    near = [beside / f"{name}.yaml"] if beside is not None else [Path(name)]
    with contextlib.suppress(OSError, ValueError):  # too long for a file's name, or no name at all
        if found := next((path for path in near if path.is_file()), None):
            return found
    known = packaged_recipes()
    if str(name) not in known:
        raise NmfxError(f"no recipe file is called {str(name)!r}{text.nearest(str(name), known)}; packaged: {', '.join(known)}")
    return known[str(name)]


def load_recipe(path: str | Path, *, data_root: str | None = None) -> Recipe:
    """Read a recipe file. One with ``base: NAME`` changes single keys of another recipe; ``null`` takes a key of it away.

    Args:
        data_root: where the pictures are, whatever the file says.

    Paths in a recipe are relative to the current folder, as on the command line.

    Raises:
        NmfxError: naming the file, the key, what was expected and the nearest known key.
    """
    path = find_recipe(path)
    tree = _read(path)
    if "base" in tree:
        if not isinstance(tree["base"], str) or not re.fullmatch(r"[\w.+-]{1,100}", tree["base"]):
            raise NmfxError(f"{path}: base: expected the name of a recipe beside it or of nmfx, found {_shown(tree['base'])}")
        try:
            start = find_recipe(tree["base"], beside=path.parent)
        except NmfxError as error:
            raise NmfxError(f"{path}: base: {error}") from error
        base = _read(start)
        if "base" in base:
            raise NmfxError(
                f"{path}: base: {tree['base']} has a base itself; start from {base['base']!r}, one level is allowed"
            )
        section(_merged({}, base), Recipe, str(start))  # its errors are not this file's
        tree = _merged(base, {key: value for key, value in tree.items() if key != "base"})
    recipe = section(_merged({}, tree), Recipe, str(path))
    if data_root is None:
        return recipe
    if recipe.data is None:
        raise NmfxError(f"{path}: --data-root {data_root}: this recipe has no data section")
    return replace(recipe, data=replace(recipe.data, root=data_root))


def _read(path: Path) -> dict[str, Any]:
    return parsing.yaml_tree(parsing.read_text(path, "a recipe"), str(path))


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `changes`, section by section; what is null goes (as in RFC 7396)."""
    result = dict(base)
    for key, value in changes.items():
        before = result.get(key)
        result[key] = _merged(before if isinstance(before, dict) else {}, value) if isinstance(value, dict) else value
    return {key: value for key, value in result.items() if not _is_null(value)}


def _is_null(value: Any) -> bool:
    return isinstance(value, str) and value in ("null", "~")


def keys_of(cls: type, without: Iterable[str] = ()) -> list[str]:
    """The keys of a section: the fields of its class, and those of the classes that stand inline."""
    hints, keys = get_type_hints(cls), []
    for item in fields(cls):
        inner = item.metadata.get(INLINE)
        keys += [item.name] if inner is None else keys_of(hints[item.name], inner)
    return [key for key in keys if key not in without]


def section(tree: Any, cls: type[T], where: str) -> T:
    """A mapping as a value of `cls`; `where` is the file, and the keys on the way to it.

    Raises:
        NmfxError: an unknown key with the nearest known one, a key that is missing, a text of another type.
    """
    tree = {} if tree == "" else tree  # a key with nothing behind it
    if not isinstance(tree, dict):
        raise NmfxError(f"{where}: expected keys with values, found {_shown(tree)}")
    text.check_keys(tree, keys_of(cls), where, NmfxError)
    if cls is SearchSection:
        _check_search(tree, where)
    hints, values, sep = get_type_hints(cls), dict[str, Any](), ": " if cls is Recipe else "."
    for item in fields(cls):  # type: ignore[arg-type]
        kind, inner = hints[item.name], item.metadata.get(INLINE)
        if inner is not None:
            own = {key: value for key, value in tree.items() if key in keys_of(kind, inner)}
            values[item.name] = section(own, kind, where)
        elif item.name in tree:
            values[item.name] = parse(tree[item.name], kind, f"{where}{sep}{item.name}")
        elif item.default is MISSING and item.default_factory is MISSING:
            raise NmfxError(f"{where}: key {item.name!r} is missing")
    try:
        return cls(**values)
    except NmfxError as error:
        raise NmfxError(f"{where}: {parsing.printable(str(error))}") from error


def _check_search(tree: Mapping[str, Any], where: str) -> None:
    """What cannot stand beside each other, or would say nothing."""
    for lonely, allowed in ALONE.items():
        if lonely in tree and (extra := next((key for key in tree if key not in (lonely, *allowed)), None)):
            raise NmfxError(
                f"{where}: {extra!r} says nothing beside {lonely!r}; {lonely} takes {', '.join(allowed) or 'no other'}"
            )
    if "limits" in tree and (extra := next((key for key in ("target", "budget") if key in tree), None)):
        raise NmfxError(f"{where}: {extra!r} and 'limits' say the same thing; give one")
    loops = tree.get("data") == "true" and tree.get("method", "domino") == "domino"
    if not loops and (extra := next((key for key in tree if key in Loop.__dataclass_fields__), None)):
        raise NmfxError(f"{where}: {extra!r} is of the published loop: it needs method domino with data: true")


def parse(value: Any, kind: Any, where: str) -> Any:
    """What YAML gives (text, lists, mappings) as a value of `kind`, a type as dataclass fields have them.

    Raises:
        NmfxError: it is none.
    """
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return _plain(value)
    if origin in (Union, UnionType):
        return _one_of(value, [arg for arg in args if arg is not NoneType], where)
    if origin is Literal:
        if value not in args:
            near = text.nearest(value, args) if isinstance(value, str) else ""
            raise NmfxError(f"{where}: expected one of {', '.join(args)}, found {_shown(value)}{near}")
        return value
    if is_dataclass(kind) and isinstance(kind, type) and kind is not Pattern:
        return section(value, kind, where)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise NmfxError(f"{where}: expected names with values, found {_shown(value)}")
        return {key: parse(each, args[1], f"{where}.{key}") for key, each in value.items()}
    if origin is not None:
        return _several(value, origin, args, where)
    return _scalar(value, kind, where)


def _several(value: Any, origin: Any, args: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    length = len(args) if origin is tuple and args[-1] is not Ellipsis else None
    if not isinstance(value, list) or (length is not None and len(value) != length):
        raise NmfxError(f"{where}: expected a list{f' of {length}' if length else ', as [a, b]'}, found {_shown(value)}")
    return tuple(parse(each, args[0], f"{where}[{index}]") for index, each in enumerate(value))


def _one_of(value: Any, kinds: Sequence[Any], where: str) -> Any:
    """The first of `kinds` that a value is; the last one's complaint when it is none of them."""
    errors = []
    for kind in kinds:
        try:
            return parse(value, kind, where)
        except NmfxError as error:
            errors.append(error)
    fitting = [e for e, kind in zip(errors, kinds, strict=True) if isinstance(value, dict) == _is_mapping(kind)]
    raise (fitting or errors)[-1]


def _is_mapping(kind: Any) -> bool:
    return (is_dataclass(kind) and kind is not Pattern) or get_origin(kind) is Mapping


def _scalar(value: Any, kind: type, where: str) -> Any:
    wrong = NmfxError(f"{where}: expected {WORDS[kind]}, found {_shown(value)}")
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
    if (kind is int and not WHOLE.fullmatch(value)) or (kind is float and not _is_number(value)):
        raise wrong
    return kind(value)


def _plain(value: Any) -> Any:
    """What YAML 1.2 takes a text for when nothing is known of it."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if WHOLE.fullmatch(value):
        return int(value)
    return TRUTH[value] if value in TRUTH else float(value) if _is_number(value) else value


def _is_number(value: str) -> bool:
    return bool(NUMBER.fullmatch(value)) and math.isfinite(float(value))


def _shown(value: Any) -> str:
    return (
        parsing.printable(repr(value), 100)
        if isinstance(value, str)
        else f"a {'list' if isinstance(value, list) else 'mapping'}"
    )
