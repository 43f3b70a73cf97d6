"""A file of ours as a typed value, at the door: read within bounds, or one error that names the file and the key.

Text becomes a tree of plain values (`json_tree`, `yaml_tree`), a tree becomes a frozen value of msgspec (`convert`). Nothing
in a file is run, followed or allocated on its word: only regular files of a bounded size are read, nesting is bounded, numbers
are finite, and YAML has no aliases, tags, doubled keys or types of its own.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Annotated, Any, TypeVar

import msgspec
import yaml

from nmfx import text
from nmfx.errors import NmfxError

MOST_TEXT = 4 << 20  # bytes of a YAML file: 20,000 sites with their shapes
MOST_JSON = 64 << 20
DEPTH = 32  # of nested lists and mappings
LOADER = getattr(yaml, "CBaseLoader", yaml.BaseLoader)  # libyaml where it is built in: 25 times faster

Text = Annotated[str, msgspec.Meta(max_length=4096)]
Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 48)]  # of a dimension
Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Finite = Annotated[float, msgspec.Meta(ge=-1e300, le=1e300)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=1e6)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]

T = TypeVar("T")


class Form(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of the values that stand in files: frozen, and every key known."""


def read_text(path: Path, what: str, error: type[NmfxError] = NmfxError, *, most: int = MOST_TEXT) -> str:
    """The text of a regular file of at most `most` bytes of UTF-8.

    Raises:
        NmfxError: of type `error`, as `open_regular`, and for too long a file or other bytes.
    """
    try:
        with open_regular(path, what, error) as file:
            content = file.read(most + 1)
    except OSError as problem:
        raise error(f"{path}: cannot be read as {what}: {problem.strerror or problem}") from problem
    if len(content) > most:
        raise error(f"{path}: cannot be read as {what}: it has more than {most} bytes")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(f"{path}: cannot be read as {what}: {problem}") from problem


def open_regular(path: Path, what: str, error: type[NmfxError]) -> IO[bytes]:
    """A regular file to read from, opened without waiting, so that a pipe that nobody writes to does not hang.

    Args:
        what: what it should be, as ``a scheme``.

    Raises:
        NmfxError: of type `error`: no such file, no permission, or no regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as problem:  # ValueError: a zero byte in the name
        if getattr(problem, "errno", None) in (errno.ENOENT, errno.ENOTDIR):
            raise error(f"{path}: no such file") from None
        raise error(f"{path}: cannot be read as {what}: {getattr(problem, 'strerror', None) or problem}") from problem
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise error(f"{path}: cannot be read as {what}: not a regular file")


def json_tree(content: str | bytes, origin: str, error: type[NmfxError] = NmfxError) -> Any:
    """JSON as plain values, nested at most `DEPTH` deep; NaN and infinities are no JSON.

    Raises:
        NmfxError: of type `error`, naming `origin` and the place.
    """
    try:
        tree = msgspec.json.decode(content)
    except (msgspec.MsgspecError, UnicodeError) as problem:
        raise error(f"{origin}: not valid JSON: {printable(str(problem))}") from problem
    except RecursionError:
        raise error(f"{origin}: not valid JSON: nested too deep") from None
    level = [tree]
    for _ in range(DEPTH):
        level = [part for whole in level if isinstance(whole, list | dict) for part in _parts(whole)]
    if level:
        raise error(f"{origin}: nested more than {DEPTH} deep")
    return tree


def _parts(whole: list[Any] | dict[str, Any]) -> Iterable[Any]:
    return whole.values() if isinstance(whole, dict) else whole


def yaml_tree(content: str, origin: str, error: type[NmfxError] = NmfxError) -> dict[str, Any]:
    """A YAML mapping whose scalars are all text (YAML 1.1 reads 2:4 as 124 and 1e-3 as text).

    Raises:
        NmfxError: of type `error`, naming `origin` and the line that is wrong: no YAML, a doubled key, an alias, anchor or tag,
            nesting deeper than `DEPTH`, more than `MOST_TEXT`.
    """
    if len(content) > MOST_TEXT:
        raise error(f"{origin}: longer than {MOST_TEXT} characters")
    try:
        tree = _build(yaml.parse(content, Loader=LOADER))
    except (yaml.YAMLError, ValueError) as problem:  # ValueError: half of a surrogate pair
        place = f"line {mark.line + 1}: " if (mark := getattr(problem, "problem_mark", None)) else ""
        what = getattr(problem, "problem", None) or problem
        raise error(f"{origin}: not valid YAML: {place}{printable(str(what))}") from problem
    if not isinstance(tree, dict):
        found = "list" if isinstance(tree, list) else "text" if tree else "nothing"
        raise error(f"{origin}: expected a YAML mapping, found {found}")
    return tree


def _build(events: Iterable[Any]) -> Any:
    """The tree of the events of one document, without recursion."""
    root, key = None, None
    above: list[tuple[Any, str | None]] = []  # the lists and mappings that are open, and the key each stands under
    here: Any = None
    documents = 0
    for event in events:
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise _wrong("a second document", event)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) or getattr(event, "tag", None):
            raise _wrong("aliases (*), anchors (&) and tags (!) are not read; quote such text", event)
        if isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            if isinstance(here, dict) and key is None:
                raise _wrong("a key that is not text", event)
            if len(above) == DEPTH:
                raise _wrong(f"nested more than {DEPTH} deep", event)
            above.append((here, key))
            here, key = ({} if isinstance(event, yaml.MappingStartEvent) else []), None
            continue
        if isinstance(event, yaml.ScalarEvent):
            value: Any = event.value
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            value = here
            here, key = above.pop()
        else:
            continue
        if here is None:
            root = value
        elif isinstance(here, list):
            here.append(value)
        elif key is not None:
            here[key], key = value, None
        elif value in here:
            raise _wrong(f"key {value!r} appears twice", event)
        else:
            key = value
    return root


def _wrong(what: str, event: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=what, problem_mark=event.start_mark)


def convert(tree: Any, kind: type[T], origin: str, error: type[NmfxError] = NmfxError, *, strict: bool = True) -> T:
    """A tree as a value of `kind`: a `Form`, or another type that msgspec knows.

    Args:
        tree: plain values, as `json_tree` and `yaml_tree` give them.
        kind: what it should be.
        origin: where it stands, for the error.
        error: what to raise.
        strict: false for YAML, whose numbers and truths are text.

    Returns:
        The value.

    Raises:
        NmfxError: of type `error`, naming `origin`, the key, what was expected and what was found.
    """
    try:
        return msgspec.convert(tree, kind, strict=strict)
    except (msgspec.ValidationError, RecursionError, OverflowError, UnicodeError) as problem:
        said, _, place = str(problem).partition(" - at `$")
        where = place.removesuffix("`").lstrip(".")
        raise error(f"{origin}: {f'{printable(where)}: ' if where else ''}{printable(said)}") from problem


def convert_each(tree: Mapping[str, Any], kind: type[T], origin: str, error: type[NmfxError] = NmfxError) -> dict[str, T]:
    """`convert` for every value of a mapping; the error names its key."""
    return {name: convert(value, kind, f"{origin}: {printable(name)}", error) for name, value in tree.items()}


def from_json(content: str | bytes, kind: type[T], origin: str, error: type[NmfxError] = NmfxError) -> T:
    """JSON as a value of `kind` (see `json_tree` and `convert`)."""
    return convert(json_tree(content, origin, error), kind, origin, error)


def read_json(path: Path, kind: type[T], what: str, error: type[NmfxError] = NmfxError) -> T:
    """A JSON file as a value of `kind` (see `read_text` and `from_json`)."""
    return from_json(read_text(path, what, error, most=MOST_JSON), kind, str(path), error)


def printable(words: str, most: int = 300) -> str:
    """`text.printable`, cut where it is long: it may be a stranger's."""
    line = text.printable(" ".join(words[: 4 * most].split()))
    return line if len(line) <= most else f"{line[:most]}..."
