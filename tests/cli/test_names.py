"""Laws of names and of what is there: nothing in a name acts on the terminal, no command deletes what nmfx did not write."""

from __future__ import annotations

import os
import re
from pathlib import Path

import folders
import pytest

from nmfx.cli import console
from nmfx.cli.main import main

STRANGE = [
    "\x1b[31mred\x1b[0m",
    "two\nlines",
    "bell\x07",
    "[bold]x[/]",
    "[/nothing]",
    "\udcff\udcfe",
    "\u202egnp",
    "a b'c\"d",
    "é日本",
]


@pytest.mark.parametrize("name", ["\x1b[31mr\n\x07[bold]x[nothing]\u202e b'c\"d日", "\udcff\udcfe"])
def test_any_name_goes_through_every_command(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = f"{name}.nmfx"
    commands = [
        ["convert", "digits", "-o", directory],
        ["search", directory, "--target", "0.5"],
        ["export", directory, "--baked"],
        ["inspect", directory],
        ["export", directory],  # refused
        ["inspect", f"{name}.none"],  # refused
        ["convert", "digits", "-o", directory],  # refused
    ]
    codes = [main(command) for command in commands]
    shown = capsys.readouterr()
    if utf8 := not any("\ud800" <= letter <= "\udfff" for letter in name):
        assert codes == [0, 0, 0, 0, 1, 1, 1], shown.err
    else:  # safetensors opens no other names
        assert "is not valid UTF-8" in shown.err
        assert "unexpected" not in shown.err
    for words in (shown.out, shown.err):
        assert all(line.isprintable() for line in words.split("\n")), words
    assert shown.err.count("error:") == sum(codes)
    assert (here / directory / "export" / "digits.safetensors").is_file() == utf8


@pytest.mark.parametrize("name", ["a" * 300, "/".join(["a" * 200] * 30), "~nouser/x", "dir/" + "b" * 256, "a/../" * 900])
@pytest.mark.parametrize(
    "command",
    [
        ["inspect", "NAME"],
        ["convert", "digits", "-o", "NAME"],
        ["convert", "digits", "--weights", "NAME"],
        ["search", "NAME"],
        ["evaluate", "digits", "--data", "NAME"],
        ["run", "NAME"],
        ["run", "digits", "--until", "build", "-o", "NAME"],
        ["compare", "NAME", "NAME"],
    ],
    ids=lambda command: " ".join(command[:3]),
)
def test_names_that_cannot_be(name: str, command: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main([name if word == "NAME" else word.replace("NAME", name) for word in command])
    error = capsys.readouterr().err
    assert "unexpected" not in error
    assert "Traceback" not in error
    assert code == 1 or name.startswith("~")  # a folder of this name, where one can be made
    assert all(line.isprintable() for line in error.split("\n"))


def test_a_progress_line_takes_any_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    console.errors.cache_clear()
    for name in STRANGE:
        with console.advancing(f"reading {name}"):
            pass
        with console.advancing(f"training on {name}") as advance:
            advance(0.5, f"{name}: half")
        console.warn(f"{name} is strange")
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    assert all(line.replace("\r", "").isprintable() for line in shown.split("\n"))
    assert "\\x1b[31mred\\x1b[0m is strange" in shown


def tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_text("utf-8", "replace")
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


@pytest.mark.parametrize(
    "mine",
    ["notes.txt", "export/mine.onnx", "export/notes", "finetune/tensorboard/mine", "stages/mine.json", "sub/deep/x", ".hidden"],
)
def test_a_users_file_keeps_its_work_directory(mine: str, here: Path, nmfx, capsys: pytest.CaptureFixture[str]) -> None:
    nmfx("convert", "digits")
    nmfx("convert", "digits", "--force")  # its own files go
    path = here / "digits.nmfx" / mine
    path.parent.mkdir(parents=True, exist_ok=True)
    for make in (lambda: path.write_text("mine"), lambda: path.symlink_to("/etc"), lambda: path.symlink_to("nowhere")):
        path.unlink(missing_ok=True)
        make()
        before = tree(here)
        assert main(["convert", "digits", "--force"]) == 1
        assert f"nmfx did not write {mine} in it" in capsys.readouterr().err
        assert tree(here) == before


def test_an_export_leaves_what_is_not_its_own(here: Path, nmfx, capsys: pytest.CaptureFixture[str]) -> None:
    nmfx("convert", "digits")
    nmfx("search", "--target", "0.5")
    for name in ("digits.onnx", "digits.baked.safetensors", "digits.txt"):
        Path(name).write_text("mine")
    assert main(["export", "-o", "."]) == 0
    assert "digits.onnx was there and is not of this export" in " ".join(capsys.readouterr().err.split())
    assert {Path(name).read_text() for name in ("digits.onnx", "digits.baked.safetensors", "digits.txt")} == {"mine"}


def test_starting_anew_keeps_what_is_not_a_run(here: Path, nmfx, capsys: pytest.CaptureFixture[str]) -> None:
    nmfx("convert", "digits")
    nmfx("search", "--target", "0.5")
    quick = ["finetune", "--data", "digits", "--epochs", "1", "--batch-size", "256", "-o", "out"]
    Path("out").mkdir()
    for name in ("last.safetensors", "log.csv", "model.safetensors"):
        Path("out", name).write_text("mine")
    Path("out", "last.safetensors").rename("last")
    assert main(quick) == 1
    assert "model.safetensors exists already; give --force" in capsys.readouterr().err
    Path("last").rename("out/last.safetensors")
    assert main([*quick, "--force"]) == 0, capsys.readouterr().err
    assert sorted(path.name for path in Path("out").glob("*.kept")) == [
        "last.safetensors.kept",
        "log.csv.kept",
        "model.safetensors.kept",
    ]
    assert main([*quick, "--force"]) == 0
    assert len(list(Path("out").glob("*.kept*"))) == 3  # the first run's own are no longer there
    Path("digits.nmfx", "scheme.search.safetensors").write_text("mine")
    nmfx("search", "--target", "0.6", "--force")
    assert Path("digits.nmfx", "scheme.search.safetensors").read_text() == "mine"


@pytest.mark.parametrize("name", ["export", "finetune"])
def test_links_out_of_a_work_directory_are_not_followed(
    name: str, here: Path, nmfx, capsys: pytest.CaptureFixture[str]
) -> None:
    nmfx("convert", "digits")
    nmfx("search", "--target", "0.5")
    folders.make_classes(here / "outside", 1)
    before = tree(here / "outside")
    (here / "digits.nmfx" / name).symlink_to(here / "outside")
    for command in (
        ["export", "--force"],
        ["finetune", "--data", "digits", "--force"],
        ["convert", "digits", "--force"],
        ["inspect"],
    ):
        assert main(command) == 1
        assert re.search(f"{name} is a link to|nmfx did not write {name}", capsys.readouterr().err)
    assert tree(here / "outside") == before
