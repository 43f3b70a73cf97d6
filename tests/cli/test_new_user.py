"""What somebody who has never seen nmfx tries first: the tour, a network of three classes, one's own checkpoint, a pipe."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nmfx.cli import bench
from nmfx.cli.commands import COMMANDS, EPILOG
from nmfx.cli.main import main
from nmfx.demo.digits import load_demo
from nmfx.export.checkpoint import load_checkpoint, read_checkpoint
from nmfx.models.building import build_model
from nmfx.models.census import find_sites
from nmfx.passes.transform import transform
from nmfx.scheme import Scheme

ROOT = Path(__file__).parents[2]
TOUR = [shlex.split(re.split(r"  +", line.strip())[0])[1:] for line in EPILOG.splitlines() if line.startswith("  nmfx ")]
SMALL = ("timm:test_resnet", "--weights", "none", "--classes", "3", "--input-size", "3x32x32")
Run = Callable[..., str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command that cannot work; its line."""

    def run(*argv: str) -> str:
        assert main(argv) == 1
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        return lines[0]

    return run


def hints(out: str) -> list[list[str]]:
    """The commands that are offered after ``next:`` and ``or:``."""
    return [shlex.split(line)[1:] for line in re.findall(r"^ *(?:next|or): (nmfx .*?)(?:  .*)?$", out, re.M)]


def test_the_tour_runs_as_it_is_printed(nmfx: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "time_pair", lambda *args: (None, []))  # a minute of compiling: test_bench_command has it
    monkeypatch.setattr(bench, "_show", lambda *args: None)
    assert {argv[0] for argv in TOUR} == COMMANDS.keys() - {"compare"}
    out = {argv[0]: nmfx(*argv) for argv in TOUR}
    rows = dict(re.findall(r"^(\S.*?)  +(\d+\.\d+)%", out["evaluate"], re.M))
    assert list(rows) == ["dense", "masked, untrained", "recalibrated", "corrected", "fine-tuned"]
    scores = list(map(float, rows.values()))
    assert scores[0] > scores[4] > scores[2] > scores[1] + 10
    assert scores[0] > scores[3] > scores[2] + 5
    assert "weights: fine-tuned from pretrained" in out["export"]
    assert max(map(len, EPILOG.splitlines())) < 80


def test_every_hint_can_be_typed(nmfx: Run) -> None:
    out, tried = nmfx("convert", "digits"), list[str]()
    while offered := [argv for argv in hints(out) if argv[0] not in tried]:
        argv = next((argv for argv in offered if argv[0] != "finetune"), offered[0])
        tried.append(argv[0])
        out = nmfx(*argv, *(["--epochs", "1"] if argv[0] == "finetune" else []))
        if argv[0] == "search":
            assert [offer[0] for offer in hints(out)] == ["finetune", "correct", "export"], "what brings accuracy back is first"
            for offer in hints(out)[2:]:
                nmfx(*offer, "--out", "as-it-is")
    assert tried == ["search", "correct", "evaluate"]


@pytest.mark.parametrize(
    ("argv", "first"),
    [(("--pattern", "2:4"), "finetune"), ((), "search")],
    ids=["with a scheme", "without"],
)
def test_convert_offers_what_its_directory_is_ready_for(argv: tuple[str, ...], first: str, nmfx: Run) -> None:
    assert hints(nmfx("convert", "digits", *argv))[0][:2] == [first, "digits.nmfx"]


def test_a_sparse_start_is_offered_a_target_that_works(nmfx: Run) -> None:
    nmfx("convert", "digits", "--pattern", "4:16")
    nmfx("export")
    (offer,) = hints(nmfx("convert", "digits", "--weights", "digits.nmfx/export/digits.safetensors", "-o", "sparser.nmfx"))
    assert "starts from sparser.nmfx/start.yaml" in nmfx(*offer)


@pytest.mark.parametrize("patterns", ["2:4", "1:4,2:4", "8:16"])
def test_patterns_alone_have_a_target_in_reach(patterns: str, nmfx: Run) -> None:
    nmfx("convert", "digits")
    out = nmfx("search", "--patterns", patterns)
    densest = patterns.split(",")[-1]
    assert re.search(rf"^target: 0\.4\d+ of params, {densest} wherever it fits; 0\.875 is out of reach", out, re.M)
    sites = find_sites(load_demo(trained=True))
    scheme = Scheme.load("digits.nmfx/scheme.yaml", sites)
    most = Scheme.uniform(sites, densest).totals(sites).kept
    assert scheme.totals(sites).kept == most or ("," in patterns and 0.8 * most < scheme.totals(sites).kept < most)
    assert "target: " not in nmfx("search", "--patterns", "1:16,2:16", "--force").replace("  target: ", "")


def test_a_network_of_three_classes_stays_one(nmfx: Run) -> None:
    """Every command builds it with the arguments that it was converted with."""
    nmfx("convert", *SMALL)
    sites = find_sites(
        build_model("timm:test_resnet", weights="none", kwargs={"num_classes": 3}).model, torch.empty(1, 3, 32, 32)
    )
    assert "3x96 linear" in nmfx("inspect")
    for argv in (["search", "--target", "0.5"], ["inspect"], ["export"]):
        assert f"{sites.weights:,}" in (out := nmfx(*argv)), argv
        assert f"{sites.macs:,}" in out, argv
    work, scheme, checkpoint = Path("test_resnet.nmfx"), "scheme.yaml", "export/test_resnet.safetensors"
    Path("lone.yaml").write_bytes((work / scheme).read_bytes())
    for pair in ((work, work / scheme), (work / scheme, work / checkpoint), (work / checkpoint, "lone.yaml")):
        assert "the same pattern at all 16 sites" in nmfx("compare", *map(str, pair))
    assert "the same pattern" in nmfx("compare", "lone.yaml", "lone.yaml", "--classes", "3", "--input-size", "32")
    assert f"{sites.macs:,}" in nmfx("inspect", "timm:test_resnet", "--classes", "3", "--input-size", "32")


def test_a_lone_scheme_says_what_is_missing(nmfx: Run, fails: Run) -> None:
    nmfx("convert", *SMALL, "--pattern", "2:4")
    Path("lone.yaml").write_bytes(Path("test_resnet.nmfx/scheme.yaml").read_bytes())
    ask = "made for other classes or another input? say --classes N, --input-size CxHxW, or --model DIR"
    for options, message in (([], "fc.weight: the scheme was made for shape (3, 96)"), (["--classes", "3"], "says macs")):
        error = fails("compare", "lone.yaml", "lone.yaml", *options)
        assert message in error
        assert error.endswith(ask)


def test_ones_own_training_checkpoint(nmfx: Run, fails: Run) -> None:
    last, averaged = (build_model("timm:test_resnet", weights="none", seed=s, kwargs={"num_classes": 3}).model for s in (1, 2))
    content = {"state_dict": last.state_dict(), "state_dict_ema": averaged.state_dict(), "args": argparse.Namespace(lr=1)}
    torch.save(content, "best.pth.tar")
    options = ("timm:test_resnet", "--weights", "best.pth.tar", "--input-size", "32")
    error = fails("convert", *options)
    assert error.startswith("error: best.pth.tar: made for 3 classes, ResNet is built with 1000; build it with --classes 3 ")
    out = nmfx("convert", *options, "--classes", "3", "--pattern", "2:4")
    assert "weights from best.pth.tar (entry 'state_dict_ema', not 'state_dict')" in out
    out = nmfx("convert", *options, "--classes", "3", "--weights-entry", "state_dict", "--out", "last.nmfx")
    assert "weights from best.pth.tar (entry 'state_dict', not 'state_dict_ema')" in out
    nmfx("export", "test_resnet.nmfx")
    found = load_checkpoint("test_resnet.nmfx/export/test_resnet.safetensors").conv1[0].weight
    assert torch.equal(found, averaged.conv1[0].weight)


def test_a_module_is_the_site_under_it(nmfx: Run) -> None:
    nmfx("convert", "digits")
    out = nmfx("search", "--target", "0.5", "--keep-dense", "classifier", "--keep-dense", "block1")
    assert "kept dense by 'classifier': classifier.weight" in out
    assert "kept dense by 'block1': block1.conv.weight" in out


def test_recalibration_goes_into_the_export(nmfx: Run) -> None:
    nmfx("convert", "digits")
    nmfx("search", "--target", "0.75")
    out = nmfx("recalibrate", "--data", "digits", "--pictures", "64")
    assert "matched 5 batch norms to the dense network's on 64 training pictures of digits" in out
    assert "weights: recalibrated, pretrained" in nmfx("export")
    header = read_checkpoint("digits.nmfx/export/digits.safetensors")[0]
    assert header.info["weights"] == "recalibrated, pretrained"
    found, masked = (
        load_checkpoint("digits.nmfx/export/digits.safetensors"),
        transform(load_demo(trained=True), Path("digits.nmfx/scheme.yaml"), example_input=torch.empty(1, 1, 8, 8)),
    )
    differing = {key for key, value in masked.state_dict().items() if key in dict(masked.named_buffers())} - {
        key for key, value in found.state_dict().items() if torch.equal(value, masked.state_dict()[key])
    }
    assert {key.rpartition(".")[2] for key in differing} == {"running_mean", "running_var"}


def test_corrected_weights_go_into_the_export_and_train_on(nmfx: Run, fails: Run) -> None:
    nmfx("convert", "digits")
    nmfx("search", "--target", "0.8")
    out = nmfx("correct", "--data", "digits", "--pictures", "96")
    assert "corrected 5 of 6 weights to give the dense network's outputs on 96 training pictures of digits" in out
    assert "wrote digits.nmfx/corrected/model.safetensors" in out
    assert "exists already; give --force" in fails("correct", "--data", "digits")
    assert "weights: corrected (admm), pretrained" in nmfx("export")
    rows = dict(re.findall(r"^(\S.*?)  +(\d+\.\d+)%", nmfx("evaluate", "--data", "digits"), re.M))
    assert float(rows["corrected"]) > float(rows["masked, untrained"]) + 20
    nmfx("finetune", "--data", "digits", "--from", "digits.nmfx/corrected/model.safetensors", "--epochs", "1")
    assert "weights: fine-tuned from model.safetensors" in nmfx("export", "--force")


KILLED = """
import os, signal
from nmfx.cli.main import main
from nmfx.passes import resuming
resuming.SHARE = 0
save, times = resuming.Ledger.save, []
def killed(self, *given):
    save(self, *given)
    times.append(1)
    len(times) == 4 and os.kill(os.getpid(), signal.SIGKILL)
resuming.Ledger.save = killed
main(["correct", "--data", "digits", "--pictures", "96"])
"""


def test_a_correction_that_is_killed_goes_on(nmfx: Run, fails: Run) -> None:
    nmfx("convert", "digits")
    nmfx("search", "--target", "0.8")
    nmfx("correct", "--data", "digits", "--pictures", "96", "-o", "whole")
    wanted, path = Path("whole/model.safetensors").read_bytes(), Path("digits.nmfx/corrected/model.safetensors")
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True, env=here)
    assert done.returncode == -signal.SIGKILL, done.stderr
    said = fails("correct", "--data", "digits", "--pictures", "96", "--seed", "1")
    assert "is of a correction with other settings (seed 0 -> 1; pictures" in said
    again = nmfx("correct", "--data", "digits", "--pictures", "96")
    assert "going on with digits.nmfx/corrected/state.safetensors; --force starts anew" in again
    assert "corrected 5 of 6 weights" in again
    assert path.read_bytes() == wanted
    assert [file.name for file in path.parent.iterdir()] == ["model.safetensors"]
    path.unlink()
    subprocess.run([sys.executable, "-c", KILLED], capture_output=True, env=here)
    assert "going on" not in nmfx("correct", "--data", "digits", "--pictures", "96", "--force", "--seed", "1")
    assert path.read_bytes() != wanted


def test_another_scheme_leaves_recalibrated_weights_out(nmfx: Run, capsys: pytest.CaptureFixture[str]) -> None:
    nmfx("convert", "digits", "--pattern", "2:4")
    nmfx("recalibrate", "--data", "digits", "--pictures", "64")
    nmfx("search", "--target", "0.75", "--force")
    assert main(("export",)) == 0
    said = capsys.readouterr()
    assert "recalibrated/model.safetensors was recalibrated under another scheme: it is left out" in said.err
    assert "weights: pretrained" in said.out
    assert "recalibrated, another scheme" in nmfx("evaluate", "--data", "digits")


STRICT: dict[str, tuple[str, ...]] = {
    "convert": ("convert", *SMALL, "-o", "x.nmfx"),
    "search": ("search", "--target", "0.5", "--force"),
    "recalibrate": ("recalibrate", "--data", "digits"),
    "correct": ("correct", "--data", "digits"),
    "finetune": ("finetune", "--data", "digits"),
    "evaluate": ("evaluate", "--data", "digits"),
    "export": ("export",),
    "bench": ("bench",),
    "run": ("run", "mine.yaml", "-o", "run"),
}


@pytest.mark.parametrize("how", ["flag", "environment"])
def test_random_weights_can_be_an_error_at_every_stage(
    how: str, nmfx: Run, fails: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    nmfx("convert", *SMALL, "--pattern", "2:4")
    Path("mine.yaml").write_text("model: {name: timm:test_resnet, weights: none, input_size: 3x32x32}\nsearch: {target: 0.5}\n")
    before = sorted(map(str, Path("test_resnet.nmfx").rglob("*")))
    if how == "environment":
        monkeypatch.setenv("NMFX_STRICT_WEIGHTS", "1")
    for name, argv in STRICT.items():
        error = fails(*argv, *(["--strict-weights"] if how == "flag" else []))
        assert "timm:test_resnet has random weights" in error, name
        assert "--strict-weights forbids them" in error, name
    assert sorted(map(str, Path("test_resnet.nmfx").rglob("*"))) == before
    assert not Path("x.nmfx").exists()


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key not in ("FORCE_COLOR", "COLUMNS")}
    clean |= {"PYTHONPATH": str(ROOT), "NMFX": f"{shlex.quote(sys.executable)} -m nmfx"} | environment
    return subprocess.run(["bash", "-o", "pipefail", "-c", command], env=clean, capture_output=True, text=True, timeout=120)


def test_a_reader_that_goes_stops_nothing(nmfx: Run) -> None:
    """What is to be written is written, whatever `| head` has seen of it."""
    nmfx("convert", "digits")
    done = shell("$NMFX search --target 0.75 | (exec 0<&-; sleep 0.1); $NMFX inspect | head -1")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("work directory digits.nmfx")
    assert Path("digits.nmfx/scheme.yaml").is_file()


@pytest.mark.parametrize("columns", ["20", "80", "120"])
def test_any_terminal_will_do(columns: str, nmfx: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    nmfx("convert", "digits", "--pattern", "2:4")
    monkeypatch.setenv("COLUMNS", columns)
    from nmfx.cli import console

    console.output.cache_clear()
    lines = nmfx("inspect").splitlines()
    assert max(map(len, lines[1:-1])) <= int(columns)
    assert "\x1b" not in "".join(lines)


def test_interrupted_anywhere_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    for name in ("cli.convert.build_weights", "cli.inspect.find_source", "cli.models.load_table", "stages.work.find_source"):
        with monkeypatch.context() as patch:
            patch.setattr(f"nmfx.{name}", interrupt)
            argv = {"convert": ["convert", "digits", "-o", "x"], "inspect": ["inspect", "digits"], "models": ["models"]}
            assert main(argv.get(name.split(".")[1], ["convert", "digits"])) == 130, name
        assert capsys.readouterr().err == "interrupted; nothing half-written\n"
    assert not list(Path().iterdir())
