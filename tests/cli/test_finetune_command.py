"""Laws of `nmfx finetune` and `nmfx evaluate`: what is written scores as what was trained, and a stopped command goes on."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from nmfx.cli.main import main
from nmfx.export.checkpoint import load_checkpoint, read_checkpoint
from nmfx.export.plain import save_baked
from nmfx.masking.sites import masked_sites
from nmfx.passes.baking import bake
from nmfx.training import trainer
from nmfx.training.loss import task_loss
from nmfx.training.state import SavedEpoch, SavedRun, load_state

ROOT = Path(__file__).parents[2]
DIGITS = ("--data", "digits", "--batch-size", "64")
QUICK = (*DIGITS, "--epochs", "1", "--lr", "0.02")
MODEL = Path("digits.nmfx/finetune/model.safetensors")
Run = Callable[..., str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command that cannot work: one line on standard error, exit code 1."""

    def run(*argv: str) -> str:
        assert main(argv) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        return error.strip()

    return run


@pytest.fixture
def work(nmfx: Run) -> Path:
    """The demo network at 2:16."""
    nmfx("convert", "demo:digits", "--pattern", "2:16")
    return Path("digits.nmfx")


def scores(out: str, row: str) -> list[str]:
    return next(line for line in out.splitlines() if line.startswith(row)).removeprefix(row).split()


def log(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open() as file:
        return [{key: value for key, value in row.items() if key != "images_per_second"} for row in csv.DictReader(file)]


def test_the_chain_from_a_scheme_to_scores(work: Path, nmfx: Run) -> None:
    out = nmfx("finetune", *QUICK, "--ema", "0.5", "--distill", "0.5", "--amp", "bf16", "--tensorboard")
    assert "loaded again, evaluates the same to the last digit" in out
    assert "of 5 sites hold at most N" in out
    assert sorted(p.name for p in MODEL.parent.iterdir()) == [
        "best.safetensors", "last.safetensors", "log.csv", "model.last.safetensors", "model.safetensors", "tensorboard"
    ]  # fmt: skip
    info = read_checkpoint(MODEL)[0].info
    assert (info["model"], info["weights"]) == ("demo:digits", "fine-tuned from pretrained (epoch 1 of 1, the best)")
    table = nmfx("evaluate", "digits.nmfx", *DIGITS)
    dense, masked, tuned = (scores(table, row) for row in ("dense", "masked, untrained", "fine-tuned"))
    assert float(dense[0].rstrip("%")) > 98
    assert float(masked[0].rstrip("%")) + 30 < float(tuned[0].rstrip("%"))
    assert f"top-1 {tuned[0]}, top-5 {tuned[1]}" in out
    assert len(tuned) == 4  # with the agreement
    save_baked(bake(load_checkpoint(MODEL)), Path("baked.safetensors"))
    baked = nmfx("evaluate", "baked.safetensors", "--model", "demo:digits", "--reference", "digits.nmfx", *DIGITS)
    packed = nmfx("evaluate", str(MODEL), "--reference", "demo:digits", *DIGITS)
    assert scores(baked, "baked.safetensors") == scores(packed, str(MODEL)) == tuned


def test_it_starts_from_a_checkpoint_from_random_weights_and_without_a_scheme(work: Path, nmfx: Run) -> None:
    nmfx("finetune", *QUICK)
    nmfx("finetune", "--from", str(MODEL), "-o", "fixed", "--training", "fixed", *QUICK)
    before, after = (load_checkpoint(path) for path in (MODEL, "fixed/model.safetensors"))
    for a, b in zip(masked_sites(before), masked_sites(after), strict=True):
        assert a.mask.equal(b.mask)
        assert (b.spec.frozen, b.spec.decay) == (True, None)
    nmfx("convert", "demo:digits", "--pattern", "1:16", "-o", "other.nmfx")
    nmfx("finetune", str(work), "--from", str(MODEL), "--scheme", "other.nmfx/scheme.yaml", "-o", "sparser", *QUICK)
    patterns = {str(site.spec.pattern) for site in masked_sites(load_checkpoint("sparser/model.safetensors"))}
    assert patterns == {"1:16"}
    nmfx("finetune", str(work), "--weights", "none", "-o", "random", "--decay", "0.001", *QUICK)
    header = read_checkpoint("random/model.safetensors")[0]
    assert header.info["weights"] == "fine-tuned from random (epoch 1 of 1, the best)"
    assert {site.decay for site in header.sites.values()} == {0.001}
    nmfx("finetune", str(work), "--scheme", "dense", "-o", "dense", *QUICK)
    assert not read_checkpoint("dense/model.safetensors")[0].sites


def test_export_takes_the_fine_tuned_weights_of_its_scheme(work: Path, nmfx: Run, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = work / "export" / "digits.safetensors"
    assert "weights: pretrained" in nmfx("export")
    nmfx("finetune", *QUICK)
    assert "weights: fine-tuned from pretrained" in nmfx("export", "--baked", "--force")
    for name, value in load_file(MODEL).items():
        assert value.equal(load_file(checkpoint)[name]), name
    assert read_checkpoint(checkpoint)[0].info["weights"] == "fine-tuned from pretrained (epoch 1 of 1, the best)"
    baked = bake(load_checkpoint(MODEL)).state_dict()
    assert all(value.equal(baked[name]) for name, value in load_file(work / "export" / "digits.baked.safetensors").items())
    nmfx("search", str(work), "--force")
    assert main(["export", "--force"]) == 0
    out, err = capsys.readouterr()
    assert "weights: pretrained" in out
    assert "was trained under another scheme: it is left out" in err


def test_the_same_command_goes_on_after_kill_9(work: Path, nmfx: Run, fails: Run) -> None:
    argv = (str(work), *DIGITS, "--epochs", "8", "--lr", "0.02", "--save-seconds", "0")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    last = work / "finetune" / "last.safetensors"
    command = [sys.executable, "-m", "nmfx", "finetune", *argv]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        limit = time.monotonic() + 60
        while not last.exists() and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        _, error = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, error
    assert not MODEL.exists()
    assert "epochs 8 -> 7" in fails("finetune", *argv, "--epochs", "7")
    out = nmfx("finetune", *argv)
    assert f"going on with {last}" in out
    nmfx("finetune", *argv, "-o", "whole")
    assert load_file(last).keys() == load_file("whole/last.safetensors").keys()
    for name, value in load_file("whole/last.safetensors").items():
        assert value.equal(load_file(last)[name]), name
    assert log(last.parent) == log(Path("whole"))
    assert MODEL.read_bytes() == Path("whole/model.safetensors").read_bytes()
    results = lambda out: [line for line in out.splitlines() if line.startswith(("best", "last", "verified"))]  # noqa: E731
    assert results(out) == results(nmfx("finetune", *argv))  # nothing left to do
    assert len(results(out)) == 4
    assert "going on" not in nmfx("finetune", *QUICK, "--force")


def test_the_best_epoch_is_what_is_exported_and_the_last_one_on_demand(
    work: Path, nmfx: Run, fails: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no last epoch of a fine-tuning under this scheme" in fails("export", "--epoch", "last")
    real, tops = trainer.evaluate, iter([0.5, 0.75, 0.75, 0.25])

    def told(*args: Any, **options: Any) -> Any:
        """The course of a run that gets worse in the end."""
        found = real(*args, **options)
        return replace(found, top1=top) if (top := next(tops, None)) is not None else found

    monkeypatch.setattr(trainer, "evaluate", told)
    out = nmfx("finetune", *DIGITS, "--epochs", "4", "--lr", "0.02")
    assert "best, epoch 2 of 4" in out
    lines = [line for line in out.splitlines() if line.startswith("epoch ")]
    assert [line.split(":")[0] for line in lines] == [f"epoch {n}/4" for n in (1, 2, 3, 4)]
    assert "top-1 75.00%" in lines[1]
    nmfx("finetune", *DIGITS, "--epochs", "4", "--lr", "0.02", "-o", "again")
    checkpoint = work / "export" / "digits.safetensors"
    for argv, name, said in (
        ((), MODEL, "epoch 2 of 4, the best"),
        (("--epoch", "last", "--force"), MODEL.with_name("model.last.safetensors"), "epoch 4 of 4, the last"),
    ):
        assert f"weights: fine-tuned from pretrained ({said})" in nmfx("export", *argv)
        assert read_checkpoint(checkpoint)[0].info["weights"] == f"fine-tuned from pretrained ({said})"
        for key, value in load_file(name).items():
            assert value.equal(load_file(checkpoint)[key]), key
    assert any(not v.equal(load_file(MODEL)[key]) for key, v in load_file(checkpoint).items())
    best = load_state(MODEL.with_name("best.safetensors"), SavedEpoch)[0]
    tuned = load_checkpoint(MODEL).state_dict()
    for site in masked_sites(load_checkpoint(MODEL)):
        name = f"{site.path}.{site.attr}"
        assert tuned[name][site.mask].equal(best[name][site.mask])


def test_more_epochs_extend_a_finished_run(work: Path, nmfx: Run) -> None:
    argv = ("finetune", str(work), *DIGITS, "--lr", "0.02")
    nmfx(*argv, "--epochs", "1")
    out = nmfx(*argv, "--epochs", "3")
    assert "going on with" in out
    assert [line.split(":")[0] for line in out.splitlines() if line.startswith("epoch ")] == ["epoch 2/3", "epoch 3/3"]
    assert [row["epoch"] for row in log(MODEL.parent)] == ["0", "1", "2"]


def test_piped_lines_come_while_it_runs(work: Path, nmfx: Run) -> None:
    """An epoch's line is there before the next one ends; in long epochs a line on standard error now and then."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    patch = (
        "import sys; from nmfx.cli import console, main; console.PIPED_SECONDS = console.FIRST_SECONDS = 0.0; "
        "sys.exit(main.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", patch, "finetune", str(work), *DIGITS, "--epochs", "1000", "--lr", "0.02"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        lines = [process.stdout.readline() for _ in range(2)]
        error = process.stderr.readline()
        process.kill()
    assert [line.split(":")[0] for line in lines] == ["epoch 1/1000", "epoch 2/1000"]
    assert re.match(r"0\.0% done: epoch 1/1000: loss \d", error), error


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model.last.safetensors", "last.safetensors", "best.safetensors", "log.csv"]
)
def test_what_cannot_be_written_is_said_before_anything_is_trained(
    name: str, work: Path, fails: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "train_loader", lambda *_, **__: pytest.fail("it has begun"))
    (work / "finetune" / name).mkdir(parents=True)
    assert f"{name}: a file is to be written there, but it is a folder" in fails("finetune", *QUICK)
    Path("file").write_text("")
    assert "file/there: cannot be written" in fails("finetune", *QUICK, "-o", "file/there")


def test_ctrl_c_waits_for_the_update_and_saves(work: Path, nmfx: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ("finetune", str(work), *DIGITS, "--epochs", "2", "--lr", "0.02")
    count = 0

    def interrupted(*args: Any) -> Tensor:
        nonlocal count
        count += 1
        if count == 23:
            os.kill(os.getpid(), signal.SIGINT)  # in the middle of an update
        return task_loss(*args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "task_loss", interrupted)
        assert main(argv) == 130
    assert count == 23
    assert load_state(work / "finetune" / "last.safetensors", SavedRun)[1].at.step == 23 - 18
    nmfx(*argv)
    nmfx(*argv, "-o", "whole")
    assert log(MODEL.parent) == log(Path("whole"))
    assert MODEL.read_bytes() == Path("whole/model.safetensors").read_bytes()


DDP = pytest.param([], id="ddp", marks=pytest.mark.slow)  # the same law as in tests/training/test_trainer.py


@pytest.mark.parametrize("how", [DDP, pytest.param(["--fsdp"], id="fsdp")])
def test_two_processes_end_where_one_does(how: list[str], work: Path, nmfx: Run) -> None:
    """Batch statistics are each process's own, so the scores agree to 2 points, as in tests/training/test_trainer.py."""
    argv = ("finetune", str(work), *DIGITS, "--epochs", "5", "--lr", "0.04")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "nmfx", *argv, *how]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(torchrun, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("evaluates the same to the last digit") == 1  # the first process speaks for both
    nmfx(*argv, "-o", "one")
    pairs = zip(log(MODEL.parent), log(Path("one")), strict=True)
    for two, one in pairs:
        assert (two["epoch"], two["lr"]) == (one["epoch"], one["lr"])
    assert float(two["top1"]) == pytest.approx(float(one["top1"]), abs=0.02)
    assert float(two["top1"]) > 0.95
    tuned = scores(nmfx("evaluate", str(work), *DIGITS), "fine-tuned")
    nmfx("export", str(work))
    checkpoint = str(work / "export" / "digits.safetensors")
    assert scores(nmfx("evaluate", checkpoint, *DIGITS), checkpoint) == tuned[:3]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["finetune", *QUICK, "--batch-size", "63", "--accumulate", "2"], "batch size 63 does not divide by 1 processes x 2"),
        (["finetune", "--data", "nowhere/at/all"], "nowhere/at/all"),
        (["finetune", *QUICK, "--lr", "1e30", "--decay", "0"], "lower lr"),
        (["finetune", *QUICK, "--scheme", "none.yaml"], "none.yaml: no scheme there, or give --scheme FILE"),
        (["finetune", "--from", "none.safetensors", *QUICK], "none.safetensors: no such file"),
        (["finetune", "--from", str(MODEL), *QUICK], "would be overwritten"),
        (["finetune", "--from", "a", "--weights", "none", *QUICK], "not both"),
        (["finetune", *QUICK, "--device", "abacus"], "--device abacus"),
        (["evaluate", "none.safetensors", *DIGITS], "none.safetensors: no such file"),
        (["evaluate", "digits.nmfx/weights.safetensors", *DIGITS], "give --model NAME"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_one_line(argv: list[str], message: str, work: Path, fails: Run) -> None:
    assert message in fails(*argv)
    assert not MODEL.exists()


def test_no_work_directory_and_no_scheme(nmfx: Run, fails: Run) -> None:
    assert "no work directory here" in fails("finetune", *QUICK)
    nmfx("convert", "demo:digits")
    assert "run `nmfx search digits.nmfx`" in fails("finetune", *QUICK)
