"""What goes wrong on a user's side: one line that says what, an exit code of 1, and the last good checkpoint as it was."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from folders import make_split
from torch import Tensor

from nmfx.cli.main import main
from nmfx.training import trainer
from nmfx.training.loss import task_loss

ROOT = Path(__file__).parents[2]
QUICK = ("--data", "digits", "--batch-size", "64", "--epochs", "2", "--lr", "0.02", "--save-seconds", "0")
FOLDER = ("--batch-size", "6", "--epochs", "1")
LAST = Path("digits.nmfx/finetune/last.safetensors")
Run = Callable[..., str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command that cannot work: one line of error, exit code 1; the line."""

    def run(*argv: str) -> str:
        assert main(argv) == 1
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("WARNING")]
        assert len(lines) == 1
        return lines[0].removeprefix("error: ")

    return run


@pytest.fixture
def work(nmfx: Run) -> str:
    """A small network of three classes for colour pictures, at 2:4."""
    nmfx("convert", "timm:test_resnet", "--weights", "none", "--classes", "3", "--input-size", "3x32x32", "--pattern", "2:4")
    return "test_resnet.nmfx"


def missing(folder: Path) -> None:
    """No folder at all."""


def empty(folder: Path) -> None:
    folder.mkdir()


def without_pictures(folder: Path) -> None:
    for name in ("cat", "dog"):
        (folder / "train" / name).mkdir(parents=True)
        (folder / "val" / name).mkdir(parents=True)


def of_two_classes(folder: Path) -> None:
    make_split(folder, train=6, validation=2)
    for part in ("train", "val"):
        for file in (folder / part / "dog").iterdir():
            file.unlink()
        (folder / part / "dog").rmdir()


def truncated(folder: Path) -> None:
    make_split(folder, train=6, validation=2)
    picture = folder / "train" / "cat" / "3.png"
    picture.write_bytes(picture.read_bytes()[:60])


def no_picture(folder: Path) -> None:
    make_split(folder, train=6, validation=2)
    (folder / "val" / "dog" / "1000.png").write_bytes(b"a letter to my landlord")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (missing, "pictures: no such folder; expected DIR/train/CLASS/*.jpg"),
        (empty, "pictures: holds nothing to train on: it is empty"),
        (without_pictures, "pictures/train/cat: holds no pictures"),
        (of_two_classes, "pictures has 2 classes, ResNet has 3 outputs"),
        (truncated, "pictures/train/cat/3.png: the picture cannot be read"),
        (no_picture, "pictures/val/dog/1000.png: the picture cannot be read"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
@pytest.mark.parametrize("workers", ["0", "1"])
def test_pictures_that_cannot_be_used(
    make: Callable[[Path], None], message: str, workers: str, work: str, here: Path, fails: Run
) -> None:
    make(here / "pictures")
    assert message in fails("finetune", work, "--data", str(here / "pictures"), *FOLDER, "--workers", workers)
    assert not (Path(work) / "finetune").exists()
    if workers == "0" and make is not truncated:  # that one is in the training part
        assert message in fails("evaluate", work, "--data", str(here / "pictures"))


@pytest.fixture
def stopped(nmfx: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> bytes:
    """A run that was interrupted in its second epoch: its last state."""
    nmfx("convert", "demo:digits", "--pattern", "2:16")
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "task_loss", after(25, KeyboardInterrupt))
        assert main(("finetune", *QUICK)) == 130
    capsys.readouterr()
    return LAST.read_bytes()


def after(updates: int, error: type[BaseException] | None) -> Callable[..., Tensor]:
    """A loss that raises, or is no number, after so many updates."""
    count = 0

    def loss(outputs: Tensor, label: Tensor, smoothing: float = 0.0) -> Tensor:
        nonlocal count
        count += 1
        if count > updates and error is not None:
            raise error
        return task_loss(outputs, label, smoothing) * (math.nan if count > updates else 1.0)

    return loss


def test_a_loss_that_is_no_number_leaves_the_last_checkpoint(
    stopped: bytes, nmfx: Run, fails: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = (LAST.parent / "best.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "task_loss", after(0, None))
        error = fails("finetune", *QUICK)
    assert "the loss is nan in epoch 1, at update 25: lower lr (0.02)" in error
    assert f"{LAST.parent} holds the last good state" in error
    assert LAST.read_bytes() == stopped
    assert (LAST.parent / "best.safetensors").read_bytes() == best
    assert not LAST.with_name("model.safetensors").exists()
    assert "going on with" in nmfx("finetune", *QUICK)


LIMITED = """
import resource, sys
from nmfx.cli.main import main
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # no file may grow beyond this: what a full disk does
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", ["finetune", "export"])
def test_a_full_disk_leaves_what_was_there(command: str, stopped: bytes, nmfx: Run) -> None:
    argv = ("finetune", *QUICK) if command == "finetune" else ("export", "--baked", "--force")
    if command == "export":
        nmfx("export")
    files = {path: path.read_bytes() for path in Path("digits.nmfx").rglob("*") if path.is_file()}
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", LIMITED, *argv], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1, done.stderr
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert {path: path.read_bytes() for path in Path("digits.nmfx").rglob("*") if path.is_file()} == files
    nmfx(*argv)


def test_a_recipe_with_a_misspelt_key_runs_nothing(fails: Run) -> None:
    Path("mine.yaml").write_text("base: digits\nfinetune:\n  epochs: 1\n  learning_rate: 1\n")
    assert "mine.yaml: finetune: unknown key 'learning_rate'" in fails("run", "mine.yaml")
    assert "mine.yaml: finetune: unknown key 'learning_rate'" in fails("run", "mine.yaml", "--check")
    assert [path.name for path in Path().iterdir()] == ["mine.yaml"]
