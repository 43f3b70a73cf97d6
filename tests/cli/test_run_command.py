"""Laws of `nmfx run`: it says what each stage does or why not, goes on after a kill, and its scores are those of `evaluate`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nmfx.cli.main import main
from nmfx.demo.digits import load_digits_data
from nmfx.export.checkpoint import load_checkpoint
from nmfx.passes.baking import bake

ROOT = Path(__file__).parents[2]
QUICK = "base: digits\nfinetune:\n  epochs: {epochs}\n  save_seconds: 0\n"
Run = Callable[..., str]


def recipe(epochs: int, name: str = "mine") -> str:
    Path(f"{name}.yaml").write_text(QUICK.format(epochs=epochs))
    return f"{name}.yaml"


def stages(out: str) -> dict[str, str]:
    """What is said of each stage."""
    lines = (line.partition(": ") for line in out.splitlines() if not line.startswith((" ", "epoch ")))
    return {name: said for name, colon, said in lines if colon}


def scores(out: str, row: str) -> list[str]:
    return next(line for line in out.splitlines() if line.startswith(row)).removeprefix(row).split()


def test_a_recipe_from_the_model_to_the_scores(nmfx: Run) -> None:
    out = nmfx("run", recipe(1), "--until", "search")
    assert list(stages(out)) == ["build", "search"]
    out = nmfx("run", recipe(1))
    assert stages(out) == {
        "build": "skipped, its output is there and still valid",
        "search": "skipped, its output is there and still valid",
        "correct": "there is no output yet",
        "finetune": "there is no output yet",
        "export": "there is no output yet",
        "evaluate": "there is no output yet",
    }
    checkpoint = "mine.nmfx/export/digits.safetensors"
    table = nmfx("evaluate", checkpoint, "--data", "digits")
    assert scores(out, "exported")[:3] == scores(table, checkpoint)
    again = nmfx("run", recipe(1))
    assert {said.split(",")[0] for said in stages(again).values()} == {"skipped"}
    assert scores(again, "exported") == scores(out, "exported")
    assert scores(nmfx("evaluate", "mine.nmfx", "--data", "digits"), "fine-tuned") == scores(out, "exported")
    changed = stages(nmfx("run", recipe(2)))
    assert changed["search"].startswith("skipped")
    assert changed["finetune"] == "changed: epochs 1 -> 2"
    assert changed["export"] == changed["evaluate"] == "a stage before it has run again"
    forced = stages(nmfx("run", recipe(2), "--force", "--until", "search"))
    assert forced == {"build": "--force", "search": "--force"}


def test_the_same_command_goes_on_after_kill_9(nmfx: Run) -> None:
    command = [sys.executable, "-m", "nmfx", "run", recipe(8)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    last = Path("mine.nmfx/finetune/last.safetensors")
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        limit = time.monotonic() + 100
        while not last.exists() and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        _, error = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, error
    before = last.stat().st_mtime_ns
    out = stages(nmfx("run", recipe(8)))
    assert (out["search"].split(",")[0], out["finetune"]) == ("skipped", "it was stopped before its end")
    assert last.stat().st_mtime_ns > before
    nmfx("run", recipe(8), "-o", "whole.nmfx")
    for name, value in load_file("whole.nmfx/finetune/last.safetensors").items():
        assert value.equal(load_file(last)[name]), name
    for name in ("finetune/model", "export/digits"):
        assert Path(f"mine.nmfx/{name}.safetensors").read_bytes() == Path(f"whole.nmfx/{name}.safetensors").read_bytes()


def test_a_stopped_run_with_other_settings_starts_anew(nmfx: Run) -> None:
    nmfx("run", recipe(1))
    state = Path("mine.nmfx/stages/finetune.json")
    state.write_text(json.dumps(json.loads(state.read_text()) | {"outputs": None}))  # as if it had been killed
    assert stages(nmfx("run", recipe(2), "--until", "finetune"))["finetune"] == "changed: epochs 1 -> 2"
    assert len(Path("mine.nmfx/finetune/log.csv").read_text().splitlines()) == 3


def test_a_recipe_exports_onnx_that_answers_as_the_checkpoint(nmfx: Run) -> None:
    import onnxruntime

    Path("mine.yaml").write_text(QUICK.format(epochs=2) + "export:\n  onnx: true\n")
    out = nmfx("run", "mine.yaml")
    assert "wrote mine.nmfx/export/digits.onnx" in out
    plain, (_, _, pictures, labels) = bake(load_checkpoint("mine.nmfx/export/digits.safetensors")), load_digits_data()
    session = onnxruntime.InferenceSession("mine.nmfx/export/digits.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: pictures.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), plain(pictures), rtol=1e-4, atol=1e-4)
    right = (torch.from_numpy(found).argmax(1) == labels).double().mean()
    assert scores(out, "exported")[0] == f"{right:.2%}"
    nmfx("run", recipe(2))  # without it, the one of before goes
    assert not Path("mine.nmfx/export/digits.onnx").exists()


def test_a_recipe_distils_from_the_dense_network(nmfx: Run, capsys: pytest.CaptureFixture[str]) -> None:
    Path("soft.yaml").write_text(QUICK.format(epochs=2) + "  distill: 0.9\n  temperature: 2\ncorrect: false\n")
    nmfx("run", "soft.yaml")
    nmfx("run", recipe(2, "hard"))
    soft, hard = (load_file(f"{name}.nmfx/export/digits.safetensors") for name in ("soft", "hard"))
    assert soft.keys() == hard.keys()
    assert not all(value.equal(hard[name]) for name, value in soft.items())
    nmfx("convert", "digits")  # the same by hand
    nmfx("search", "digits.nmfx")
    how = ("--epochs", "2", "--batch-size", "64", "--lr", "0.02", "--distill", "0.9", "--temperature", "2")
    nmfx("finetune", "digits.nmfx", "--data", "digits", *how)
    for name, value in load_file("digits.nmfx/finetune/model.safetensors").items():
        assert value.equal(soft[name]), name
    changed = stages(nmfx("run", "soft.yaml", "--until", "finetune"))
    assert changed["finetune"].startswith("skipped")
    Path("random.yaml").write_text(QUICK.format(epochs=1) + "  distill: 0.9\nmodel:\n  weights: none\n")
    assert main(("run", "random.yaml")) == 1
    assert "distill learns from the dense weights of a work directory, and here are none" in capsys.readouterr().err


def test_check_needs_no_data(nmfx: Run) -> None:
    out = nmfx("run", "digits", "--check")
    assert "build: demo:digits (pretrained weights)" in out
    assert "one update on 2 random pictures of 1x8x8" in out
    assert out.splitlines()[-1].startswith("no data was used")
    assert not list(Path().iterdir())


def test_check_of_a_large_recipe(nmfx: Run) -> None:
    out = nmfx("run", "resnet50-0.80", "--check")
    assert "54 sites, 25,502,912 weights, 4,089,184,256 MACs" in out
    assert "one update on 2 random pictures of 3x224x224" in out
    assert "no data was used" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["run", "digit"], "no recipe file is called 'digit' (did you mean 'digits'?)"),
        (["run", "wrong.yaml"], "wrong.yaml: finetune: unknown key 'epoch' (did you mean 'epochs'?)"),
        (["run", "resnet50-0.80", "-o", "full"], "full exists, and is no work directory of nmfx"),
        (["run", "gone.yaml"], "none.safetensors"),
    ],
)
def test_what_cannot_be_run_is_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("wrong.yaml").write_text("base: digits\nfinetune:\n  epoch: 3\n")
    Path("gone.yaml").write_text("base: digits\nmodel:\n  weights: none.safetensors\n")
    Path("full").mkdir()
    Path("full/thesis.txt").write_text("")
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
