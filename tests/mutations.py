"""Damage: bytes that change, and trees of plain values whose keys, types, sizes and places change."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 2**31, 2**53, 2**63 - 1, 2**63, -(2**63), 10**30, 10**400),
    *(0.5, -0.0, 1e-320, 1e308, -1e308, 3e9, float("nan"), float("inf"), -float("inf")),
    *(
        "",
        "a",
        "nan",
        "1e308",
        "1e999",
        "-1",
        "3000000000",
        "9" * 5000,
        "x" * 100_000,
        "\0",
        "\x1b[31m",
        "\ud800",
        "٣",
        "no",
        "~",
    ),
    *(
        "2:4",
        "0:0",
        "64:64",
        "4:2",
        "999:999",
        "abc",
        "strict",
        "flat",
        "dense",
        "hf-hub:a/b",
        "local-dir:/tmp",
        "../x",
        "/dev/zero",
    ),
    *(
        [],
        {},
        [[]],
        {"": {}},
        [0] * 1000,
        [1, 2, 3],
        [2**40] * 3,
        {"checkpoint_path": "/tmp/x"},
        {"num_classes": 3_000_000_000},
    ),
    *({"pretrained_cfg": {"file": "/tmp/x"}}, {"num_classes": 999_999}, {"img_size": 8192, "patch_size": 1}),
)


def deep(levels: int) -> Any:
    """Lists and mappings in each other."""
    tree: Any = 1
    for level in range(levels):
        tree = [tree] if level % 2 else {"a": tree}
    return tree


def mutate_bytes(content: bytes, pick: random.Random) -> bytes:
    """`content` with one to four changes."""
    data = bytearray(content)
    for _ in range(pick.choice((1, 1, 1, 2, 4))):
        at, length = pick.randrange(len(data) + 1), pick.choice((1, 1, 2, 8, 64, 1000))
        kind = pick.randrange(7)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << pick.randrange(8)
        elif kind == 1:
            data[at : at + length] = pick.randbytes(len(data[at : at + length]))
        elif kind == 2:
            del data[at : at + length]
        elif kind == 3:
            data[at:at] = pick.randbytes(length)
        elif kind == 4:
            data[at:at] = data[at : at + length]
        elif kind == 5:
            del data[at:]
        else:
            data[at:at] = (
                pick.choice((b"[", b"{", b"&a ", b"*a", b"!!int ", b"\n", b"'", b'"', b": ", b"- ", b"9" * 30)) * length
            )
    return bytes(data)


def mutate_tree(tree: Any, pick: random.Random) -> Any:
    """A copy of `tree` with one to three changes: keys that go, come or are renamed, values that change type, size or place."""
    tree = copy.deepcopy(tree)
    for _ in range(pick.choice((1, 1, 1, 2, 3))):
        places = list(_places(tree))
        if not places:
            return tree
        whole, key = pick.choice(places)
        kind = pick.randrange(8)
        if kind == 0:
            del whole[key]
        elif kind == 1:
            whole[key] = copy.deepcopy(pick.choice(HOSTILE))
        elif kind == 2:
            whole[key] = _retyped(whole[key], pick)
        elif kind == 3:  # two values change places
            other, name = pick.choice(places)
            whole[key], other[name] = copy.deepcopy(other[name]), copy.deepcopy(whole[key])
        elif kind == 4 and isinstance(whole, dict):
            value = whole.pop(key)
            whole[pick.choice(("", key + "x", "values", "a:b", key.upper(), "\x1b[2J", "x" * 5000))] = value
        elif kind == 5 and isinstance(whole, list):
            whole.insert(pick.randrange(len(whole) + 1), copy.deepcopy(whole[key]))
        elif kind == 6:
            whole[key] = deep(pick.choice((3, 31, 33, 200)))
        elif isinstance(whole[key], int | float):
            whole[key] = whole[key] * pick.choice((-1, 0, 2, 3, 0.5, 10**12)) + pick.choice((0, 1, -1))
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    stack = [tree]
    while stack:
        whole = stack.pop()
        for key in whole if isinstance(whole, dict) else range(len(whole)):
            yield whole, key
            if isinstance(whole[key], dict | list):
                stack.append(whole[key])


def _retyped(value: Any, pick: random.Random) -> Any:
    return pick.choice(([value], {"a": value}, str(value)[:1000], None, not value, [value, value]))


def to_json(tree: Any) -> str:
    """JSON of what Python's own writer can say, NaN and half of a surrogate pair included."""
    return json.dumps(tree, sort_keys=True)


def to_yaml(tree: Any, pick: random.Random, indent: int = 0) -> str:
    """YAML of a tree, plainly: texts are quoted now and then, numbers as Python writes them, empty things in flow style."""
    space = "  " * indent
    if indent > 250:
        return "x\n"
    if isinstance(tree, dict) and tree:
        return "\n" * (indent > 0) + "".join(
            f"{space}{_word(k, pick)}: {to_yaml(v, pick, indent + 1)}" for k, v in tree.items()
        )
    if isinstance(tree, list) and tree:
        return "\n" * (indent > 0) + "".join(f"{space}- {to_yaml(each, pick, indent + 1).lstrip()}" for each in tree)
    return f"{_word(tree, pick)}\n"


def _word(value: Any, pick: random.Random) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if not isinstance(value, str):
        return json.dumps(value)
    plain = value.isprintable() and value == value.strip() and value[:1] not in "\"'[]{}&*!|>%@`#-?:," and ": " not in value
    return value if plain and value and pick.random() < 0.9 else json.dumps(value)
