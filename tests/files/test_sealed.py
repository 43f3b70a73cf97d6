"""Laws of files under a checksum: a state comes back as it was written, and one that is not whole is refused, by name."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from nmfx.errors import CheckpointError
from nmfx.files.parsing import Count, Form
from nmfx.files.sealed import MOST_HEADER, read_sealed, read_shapes, write_sealed
from nmfx.files.states import read_state, write_state


class About(Form, frozen=True):
    at: Count
    losses: list[float] = []  # noqa: RUF012 - msgspec copies it


TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.tensor([True, False]),
    "c": torch.tensor(7),
    "none": torch.empty(0, 3),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_state(tmp_path / "state.safetensors", "kind", TENSORS, {"at": 3, "losses": [0.1, 1e-300]})
    return tmp_path / "state.safetensors"


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_state(path, "kind", "a run", About)
    said = str(caught.value)
    assert said.startswith(f"{path}: not a run to resume (")
    assert said.endswith("; remove it, or give --force to start anew")
    return said


def test_a_state_comes_back(path: Path) -> None:
    tensors, about = read_state(path, "kind", "a run", About)
    assert about == About(3, [0.1, 1e-300])
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], value) and tensors[name].dtype == value.dtype for name, value in TENSORS.items())


def test_a_tied_tensor_is_stored_once(tmp_path: Path) -> None:
    one = torch.randn(4)
    write_state(tmp_path / "s", "kind", {"a": one, "b": one}, {"at": 1})
    assert read_shapes(tmp_path / "s") == {"a": (4,)}
    tensors, _ = read_state(tmp_path / "s", "kind", "a run", About)
    assert torch.equal(tensors["b"], one)


def test_any_bit_that_flips_in_a_tensor_is_seen(path: Path) -> None:
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for place in range(start, len(content)):
        for bit in range(8):
            spoilt = bytearray(content)
            spoilt[place] ^= 1 << bit
            path.write_bytes(spoilt)
            assert "altered since it was written (the SHA-256 differs)" in refused(path)


def test_any_bit_that_flips_in_the_header_is_seen_or_changes_nothing(path: Path) -> None:
    content, pick = path.read_bytes(), random.Random(0)
    for place in range(8 + int.from_bytes(content[:8], "little")):
        spoilt = bytearray(content)
        spoilt[place] ^= 1 << pick.randrange(8)
        path.write_bytes(spoilt)
        refused(path)


def test_a_truncated_state_is_refused(path: Path) -> None:
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        refused(path)


OTHERS: dict[str, tuple[dict[str, str] | None, str]] = {
    "plain": (None, "not a run of nmfx"),
    "before there were checksums": ({"nmfx": "kind", "shared": "{}", "about": '{"at": 3}'}, "header is damaged"),
    "a number": ({"nmfx": "3"}, "no version or digest"),
    "no digest": ({"nmfx": '{"version": 1}'}, "no version or digest"),
    "later": ({"nmfx": '{"version": 2, "digest": ""}'}, "version 2, this nmfx reads version 1"),
    "true": ({"nmfx": '{"version": true, "digest": ""}'}, "version True"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_files_are_refused(case: str, tmp_path: Path) -> None:
    metadata, message = OTHERS[case]
    safetensors.torch.save_file(TENSORS, tmp_path / "other", metadata)
    assert message in refused(tmp_path / "other")


CONTENTS: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"kind": "else"}, "another kind of file"),
    "no kind": ({}, "missing required field `kind`"),
    "a number for a kind": ({"kind": 1}, "kind: Expected `str`"),
    "a negative count": ({"kind": "kind", "about": {"at": -1}}, "about: at: Expected `int` >= 0"),
    "a missing key": ({"kind": "kind", "about": {}}, "about: Object missing required field `at`"),
    "an unknown key": ({"kind": "kind", "about": {"at": 1, "att": 1}}, "unknown field `att`"),
    "shared with nothing": ({"kind": "kind", "about": {"at": 1}, "shared": {"x": "y"}}, "shared: x: "),
    "shared with itself": ({"kind": "kind", "about": {"at": 1}, "shared": {"a": "a"}}, "shared: a: "),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_a_right_digest_makes_no_right_header(case: str, tmp_path: Path) -> None:
    content, message = CONTENTS[case]
    write_sealed(tmp_path / "state", {"version": 1, "shared": {}, "about": {}} | content, TENSORS)
    assert message in refused(tmp_path / "state")


def test_only_regular_files_with_a_header_of_some_size_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match=r"not a regular file|no such file"):
            read_sealed(place, "a checkpoint", 1)
    with (tmp_path / "large").open("wb") as file:
        file.write((MOST_HEADER + 1).to_bytes(8, "little"))
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_sealed(tmp_path / "large", "a checkpoint", 1)


def test_numbers_without_end_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not finite"):
        write_state(tmp_path / "state", "kind", TENSORS, {"at": float("nan")})
    assert list(tmp_path.iterdir()) == []
