"""A file of ours becomes a typed value, or one NmfxError that names the file and the key."""

from __future__ import annotations

import math
import os
import socket
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from nmfx.errors import NmfxError, SchemeError
from nmfx.files import parsing
from nmfx.files.parsing import DEPTH, Form, convert, from_json, json_tree, read_text, yaml_tree


class Point(Form, frozen=True):
    name: parsing.Text
    sizes: tuple[parsing.Size, ...] = ()
    weight: parsing.Finite = 0.0


GOOD = '{"name": "a", "sizes": [1, 2], "weight": 0.5}'
BAD = {
    "no json": ('{"name": ', "here: not valid JSON"),
    "deep": ("[" * 100_000, "here: not valid JSON: nested too deep"),
    "less deep": ("[" * 40 + "]" * 40, f"here: nested more than {DEPTH} deep"),
    "missing": ("{}", "here: Object missing required field `name`"),
    "unknown": ('{"name": "a", "nam": 1}', "here: Object contains unknown field `nam`"),
    "type": ('{"name": 1}', "here: name: Expected `str`, got `int`"),
    "type deeper": ('{"name": "a", "sizes": [1, "2"]}', r"here: sizes\[1\]: Expected `int`, got `str`"),
    "negative": ('{"name": "a", "sizes": [-1]}', r"here: sizes\[0\]: Expected `int` >= 1"),
    "huge": ('{"name": "a", "sizes": [99999999999999999999]}', r"here: sizes\[0\]: "),
    "endless digits": ('{"name": "a", "sizes": [' + "9" * 100_000 + "]}", "here: "),
    "nan": ('{"name": "a", "weight": NaN}', "here: not valid JSON"),
    "infinite": ('{"name": "a", "weight": 1e999}', "here: not valid JSON: Number out of range"),
    "almost infinite": ('{"name": "a", "weight": 1e308}', "here: weight: Expected `float` <= "),
    "half a pair": (r'{"name": "\ud800"}', "here: not valid JSON"),
    "list": ("[]", "here: Expected `object`, got `array`"),
}


@pytest.mark.parametrize("case", BAD)
def test_json_that_is_no_value_names_the_file_and_the_key(case: str) -> None:
    content, message = BAD[case]
    with pytest.raises(SchemeError, match=message):
        from_json(content, Point, "here", SchemeError)


def test_json_becomes_a_frozen_value() -> None:
    point = from_json(GOOD, Point, "here")
    assert point == Point("a", (1, 2), 0.5)
    with pytest.raises(AttributeError):
        point.name = "b"  # type: ignore[misc]


def test_text_of_yaml_is_no_nan() -> None:
    for number in ("nan", "inf", "-inf", "1e400", "1e308", "1_000", "0x10"):
        with pytest.raises(NmfxError, match="here: weight: "):
            convert({"name": "a", "weight": number}, Point, "here", strict=False)


YAML = {
    "aliases": ("a: &a [x]\nb: *a\n", "line 1: aliases"),
    "bomb": (
        "a: &a [x,x,x,x,x,x,x,x]\n"
        + "".join(f"{c}: &{c} [{','.join(8 * [f'*{p}'])}]\n" for p, c in zip("abcdefgh", "bcdefghi")),
        "aliases",
    ),
    "tag": ("a: !!python/object/apply:os.system [ls]\n", "tags"),
    "twice": ("a: 1\na: 2\n", "'a' appears twice"),
    "twice deeper": ("a: {b: 1, b: 2}\n", "'b' appears twice"),
    "list as a key": ("[a]: 1\n", "a key that is not text"),
    "mapping as a key": ("? {a: 1}\n: 1\n", "a key that is not text"),
    "deep": ("a: " + "[" * 100_000, "nest(ed|ing)"),
    "deep mappings": ("".join(" " * i + "a:\n" for i in range(200)), "nest(ed|ing)"),
    "two documents": ("a: 1\n---\nb: 1\n", "second document"),
    "list": ("- a\n", "expected a YAML mapping, found list"),
    "text": ("abc", "expected a YAML mapping, found text"),
    "nothing": ("", "expected a YAML mapping, found nothing"),
    "long": ("a: " + "b" * parsing.MOST_TEXT, "longer than"),
    "escape": ("a: '\x1b[31m'\n", "not valid YAML"),
    "half a pair": ("a: \ud800\n", "not valid YAML"),
}


@pytest.mark.parametrize("loader", [yaml.BaseLoader, parsing.LOADER])
@pytest.mark.parametrize("case", YAML)
def test_yaml_that_is_no_plain_mapping_is_an_error(case: str, loader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parsing, "LOADER", loader)
    content, message = YAML[case]
    with pytest.raises(SchemeError, match=f"(?s)^here: .*({message})") as caught:
        yaml_tree(content, "here", SchemeError)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


words = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=8)
trees = st.recursive(
    words, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3), max_leaves=12
)


@given(st.dictionaries(words, trees, max_size=4), st.booleans())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_yaml_gives_back_every_tree_of_texts(tree: dict[str, Any], flow: bool) -> None:
    class Plain(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    content = yaml.dump(tree, Dumper=Plain, allow_unicode=True, default_flow_style=flow)
    assert yaml_tree(content, "here") == yaml.load(content, Loader=yaml.BaseLoader)


scalars = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | words
)


@given(st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3)))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_json_gives_back_every_tree(tree: Any) -> None:
    import json

    assert json_tree(json.dumps(tree), "here") == tree


@given(st.binary(max_size=60))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_bytes_are_a_tree_or_one_error(content: bytes) -> None:
    for parse in (json_tree, yaml_tree):
        try:
            parse(content.decode("latin-1"), "here", SchemeError)
        except SchemeError as error:
            assert str(error).startswith("here: ")  # noqa: PT017 - any other exception fails


def test_only_regular_files_are_read(tmp_path: Any) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for name in ("pipe", "socket", ".", "/dev/zero"):
            with pytest.raises(SchemeError, match="cannot be read as a scheme: "):
                read_text(tmp_path / name, "a scheme", SchemeError)
    for name in ("absent", "absent/file"):
        with pytest.raises(SchemeError, match="no such file"):
            read_text(tmp_path / name, "a scheme", SchemeError)
    for name in ("x" * 300, "zero\0byte"):
        with pytest.raises(SchemeError, match="cannot be read as a scheme"):
            read_text(tmp_path / name, "a scheme", SchemeError)


def test_files_are_read_up_to_a_size(tmp_path: Any) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(NmfxError, match="more than 10 bytes"):
        read_text(path, "a scheme", most=10)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(NmfxError, match=r"cannot be read as a scheme: .*utf-8"):
        read_text(path, "a scheme")
    path.write_bytes(b"0123456789")
    assert read_text(path, "a scheme", most=10) == "0123456789"


def test_bounds_hold_for_numbers() -> None:
    for value in (math.nan, math.inf, -math.inf, 1e308, True, "1", None):
        with pytest.raises(NmfxError):
            convert(value, parsing.Finite, "here")
