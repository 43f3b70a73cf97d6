"""Laws of a recipe's folder: what a user put there survives every run, under its name or beside it, and no link leads out."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from nmfx.errors import NmfxError
from nmfx.files.states import write_state
from nmfx.recipe.loader import load_recipe
from nmfx.stages.pipeline import FOLDERS, STAGES, Pipeline
from nmfx.stages.stamp import Stamp, digests, write_stamp
from nmfx.stages.written import LOG_HEAD, Written, is_state, remove_events, remove_state
from nmfx.training.record import Epoch, write_log

NAMES = ("a", "b", "export/c")
ACTIONS = st.sampled_from(["user", "run", "run and stop", "stale", "link", "list lost"])


def contents(folder: Path) -> set[str]:
    """The text of every file below a folder, and where links lead."""
    files = [path for path in folder.rglob("*") if path.is_symlink() or path.is_file()]
    return {os.readlink(path) if path.is_symlink() else path.read_text() for path in files}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.tuples(ACTIONS, st.sampled_from(NAMES)), max_size=8))
def test_whatever_a_user_wrote_is_still_there(tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str]]) -> None:
    folder = tmp_path_factory.mktemp("run")
    (folder / "export").mkdir()
    users: dict[str, str] = {}  # what a user put at a name last, by his own hand
    for number, (action, name) in enumerate(steps):
        path = folder / name
        if action in ("user", "link"):  # he may replace what is his
            path.unlink(missing_ok=True)
            users = {word: where for word, where in users.items() if where != name}
            path.write_text(f"mine {number}") if action == "user" else path.symlink_to(f"mine {number}")
            users[f"mine {number}"] = name
        elif action == "list lost":
            (folder / "stages" / "written.json").unlink(missing_ok=True)
        else:
            written = Written(folder)
            said = written.clear(name)
            assert not os.path.lexists(path)
            assert said or name not in users.values()
            users = {word: "" if where == name else where for word, where in users.items()}
            if action != "stale":
                path.write_text(f"ours {number}")
            if action == "run":
                Written(folder).record(digests(folder, [name]))
        assert users.keys() <= contents(folder), (action, name)


def test_what_was_written_is_replaced_without_a_word(tmp_path: Path) -> None:
    for _ in range(3):
        assert Written(tmp_path).clear("a") == []
        (tmp_path / "a").write_text("ours")
        Written(tmp_path).record(digests(tmp_path, ["a"]))
    (tmp_path / "a").write_text("altered")
    for number, name in enumerate(("a.kept", "a.kept2")):
        assert Written(tmp_path).clear("a") == [
            f"{tmp_path / 'a'} was not written by nmfx, or was altered since: it is kept as {name}"
        ]
        Written(tmp_path).record({})
        assert (tmp_path / name).is_file()
        (tmp_path / "a").write_text(f"again {number}")


def test_a_folder_of_an_earlier_version_has_its_stamps(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("ours")
    write_stamp(tmp_path, "build", Stamp({}, "", digests(tmp_path, ["a"])))
    assert Written(tmp_path).ours("a")
    assert not Written(tmp_path).ours("stages/build.json")
    for damaged in ("{", "[]", '{"a": 1}', '{"a": "0"}'):
        (tmp_path / "stages" / "written.json").write_text(damaged)
        assert Written(tmp_path).ours("a") == (damaged != '{"a": "0"}')


def test_only_files_of_ours_count_as_states(tmp_path: Path) -> None:
    write_state(tmp_path / "state.safetensors", "some state", {"x": torch.zeros(1)}, {})
    write_log(tmp_path / "log.csv", [Epoch(0, 1.0, 0.5, 0.6, 1.0, 0.1, 10.0)])
    assert (tmp_path / "log.csv").read_text().startswith(LOG_HEAD)
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    (tmp_path / "foreign.csv").write_text("epoch,mine\n")
    (tmp_path / "linked.safetensors").symlink_to("state.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.csv").mkdir()
    for path in sorted(tmp_path.iterdir()):
        ours = path.name in ("state.safetensors", "log.csv")
        assert is_state(path) == ours
        assert len(remove_state(path)) == (not ours)
        assert not os.path.lexists(path)
        assert os.path.lexists(f"{path}.kept") != ours
    assert remove_state(tmp_path / "nothing") == []


def test_only_files_of_tensorboard_are_removed(tmp_path: Path) -> None:
    board = tmp_path / "board"
    board.mkdir()
    (board / "events.out.tfevents.1.host").write_text("")
    (board / "notes.txt").write_text("mine")
    remove_events(board)
    assert [path.name for path in board.iterdir()] == ["notes.txt"]
    (tmp_path / "link").symlink_to("board")
    remove_events(tmp_path / "link")
    remove_events(tmp_path / "nothing")
    (board / "notes.txt").unlink()
    remove_events(board)
    assert not board.exists()
    assert (tmp_path / "link").is_symlink()


def test_a_run_spares_what_it_did_not_write(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    recipe = replace(load_recipe("digits"), finetune=None, data=None)
    assert recipe.export.baked

    def run(recipe, *, anew: bool = False) -> list[str]:
        pipeline = Pipeline(recipe, folder)
        return [line for stage in pipeline.stages for line in pipeline.run(stage, anew=anew)]

    assert not [line for line in run(recipe) if "kept as" in line]
    mine = [
        "notes.txt", "export/digits.onnx", "export/digits.plan.pdf", "export/digits.safetensors", "scheme.txt", "start.yaml",
        "finetune/model.safetensors", "stages/notes.json", "scheme.search.safetensors",
    ]  # fmt: skip
    for name in mine:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"mine: {name}")
    other = replace(recipe, export=replace(recipe.export, baked=False))
    for anew, renamed in ((False, 3), (True, 1), (False, 0)):
        said = run(other, anew=anew)
        assert {f"mine: {name}" for name in mine} <= {
            path.read_text() for path in folder.rglob("*") if path.is_file() and path.stat().st_size < 100
        }
        assert (folder / "export" / "digits.onnx").read_text() == "mine: export/digits.onnx"
        assert sum("kept as" in line for line in said) == renamed
    assert not (folder / "export" / "digits.baked.safetensors").exists()  # its own of before


@pytest.mark.parametrize("name", FOLDERS)
def test_nothing_is_written_behind_a_link(tmp_path: Path, name: str) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "run"
    outside.mkdir()
    (outside / "digits.mine").write_text("mine")
    (folder / "stages").mkdir(parents=True)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / "stages").rmdir() if name == "stages" else None
    (folder / name).symlink_to(outside)
    with pytest.raises(NmfxError, match=f"{name} is a link to .*outside: nothing is written or deleted behind it"):
        Pipeline(load_recipe("digits"), folder)
    assert [path.name for path in outside.iterdir()] == ["digits.mine"]
    assert set(STAGES) == {"build", "search", "correct", "finetune", "export", "evaluate"}
