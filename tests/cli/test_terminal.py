"""What the terminal shows: tables of any width, colours only where they are wanted, JSON for programs, the tour, completion."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nmfx.cli import console, tables
from nmfx.cli.commands import COMMANDS, EPILOG, parser
from nmfx.cli.main import main
from nmfx.models.census import find_sites
from nmfx.models.site import Sites
from nmfx.models.source import find_source
from nmfx.scheme import Scheme

ROOT = Path(__file__).parents[2]
Run = Callable[..., str]


@pytest.fixture(scope="module")
def sites() -> Sites:
    return find_sites(find_source("torchvision:resnet18").build_meta())


def drawn(table: object, width: int, **about: object) -> str:
    file = io.StringIO()
    console.Terminal(file=file, width=width, highlight=False, markup=False, **about).print(table)
    return file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("kind", ["sites", "bars"])
def test_names_stay_whole(kind: str, width: int, sites: Sites) -> None:
    scheme = Scheme.uniform(sites, "2:4")
    table = tables.site_table(sites, scheme, {}) if kind == "sites" else tables.scheme_bars(sites, scheme, width)
    lines = drawn(table, width).splitlines()
    assert max(map(len, lines)) <= width
    assert [line.split()[0] for line in lines[1 : 1 + len(sites)]] == [site.name for site in sites]
    assert all("pattern" in line for line in lines[:1])
    left_out = [line for line in lines if line.startswith("no room for: ")]
    assert bool(left_out) == (width == 60)
    if left_out:
        named = left_out[0].removeprefix("no room for: ").split(", ")
        assert not any(name in lines[0] for name in named)
        assert set(named) <= {"shape", "weights", "MACs", "of weights"}


def test_a_name_that_fits_nowhere_is_folded_and_not_cut() -> None:
    table = tables.table("site~", "shape?", "pattern>")
    table.add_row("a" * 70, "1x1", "2:4")
    lines = drawn(table, 60).splitlines()
    assert sum(line.count("a") for line in lines[1:3]) == 70
    assert "no room for: shape" in lines[-1]


@pytest.mark.parametrize(
    ("environment", "coloured"),
    [({}, False), ({"NO_COLOR": "1"}, False), ({"FORCE_COLOR": "1"}, True), ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False)],
    ids=str,
)
def test_colours_are_for_terminals_that_want_them(environment: dict[str, str], coloured: bool, tmp_path: Path) -> None:
    clean = {key: value for key, value in os.environ.items() if key not in ("FORCE_COLOR", "NO_COLOR", "COLUMNS")}
    clean |= {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color"}
    command = [sys.executable, "-m", "nmfx", "convert", "digits", "--pattern", "2:4"]
    done = subprocess.run(command, env=clean | environment, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0
    assert ("\x1b[32m" in done.stdout) == coloured


def test_nothing_typed_is_the_tour(nmfx: Run) -> None:
    out = nmfx()
    assert EPILOG in out
    assert "`nmfx --help` lists the commands" in out


def test_an_option_without_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--versoin"])
    assert "unknown argument '--versoin' (did you mean '--version'?)" in capsys.readouterr().err


@pytest.fixture
def values(nmfx: Run) -> Callable[..., dict]:
    """What a command shows with --json: one value, alone on standard output."""
    return lambda *argv: json.loads(nmfx(*argv, "--json"))


def test_json_of_what_is_looked_at(nmfx: Run, values: Callable[..., dict]) -> None:
    nmfx("convert", "digits", "--pattern", "2:16")
    nmfx("export", "--compiled")
    names = [site.name for site in find_sites(find_source("demo:digits").build_meta())]
    work = values("inspect")
    assert (work["kind"], work["model"], work["weights"]) == ("work directory", "demo:digits", "pretrained")
    assert [one["site"] for one in work["sites"]] == names
    assert sum(one["kept"] for one in work["sites"]) == work["totals"]["kept"]
    assert values("inspect", "demo:digits")["totals"] is None
    found = {kind: values("inspect", f"digits.nmfx/export/{name}") for kind, name in (
        ("checkpoint", "digits.safetensors"), ("compiled model", "digits.nmfxc"), ("scheme", "scheme.yaml"),
        ("published scheme", "scheme.txt"),
    )}  # fmt: skip
    for kind, one in found.items():
        assert one["kind"] == kind
    assert found["scheme"]["patterns"]["block1.conv.weight"] == "2:16"
    assert {one["site"] for one in found["checkpoint"]["sites"]} == set(names) - {"stem.conv.weight"}
    both = values("compare", "digits.nmfx", "digits.nmfx/export/scheme.yaml")
    assert [one["differs"] for one in both["sites"]] == [False] * len(names)
    assert [one["scheme"] for one in both["schemes"]] == ["digits.nmfx", "digits.nmfx/export/scheme.yaml"]


def test_json_of_scores_and_models(nmfx: Run, values: Callable[..., dict]) -> None:
    nmfx("convert", "digits", "--pattern", "8:16")
    found = values("evaluate", "--data", "digits")["scores"]
    assert found.keys() == {"dense", "masked, untrained"}
    assert 0.9 < found["dense"]["top1"] <= 1
    assert found["dense"]["samples"] == 599
    models = values("models", "torchvision:resnet18")
    assert [one["model"] for one in models["models"]] == ["torchvision:resnet18"]
    assert models["models"][0]["parameters"] == 11_689_512


def test_json_of_speed(nmfx: Run, values: Callable[..., dict]) -> None:
    nmfx("convert", "digits", "--pattern", "2:16")
    found = values("bench", "--batch", "1", "--threads", "1", "--turns", "2", "--engines", "none")
    assert {one["engine"] for one in found["timings"]} >= {"nmfx", "PyTorch"}
    assert all(one["median"] > 0 and len(one["seconds"]) == 2 for one in found["timings"])
    assert len(found["sites"]) == 6


@pytest.mark.parametrize("name", ["inspect", "compare", "evaluate", "bench", "models", "export"])
def test_errors_are_said_as_ever(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rest = {"compare": ["no", "no"], "evaluate": ["no.yaml", "--data", "digits"], "models": ["no such"]}.get(name, ["no.yaml"])
    assert main([name, *rest, "--json"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")


RANDOM = ("timm:test_resnet", "--weights", "none", "--classes", "3", "--input-size", "3x32x32")


def test_random_weights_are_said_once_and_first(capfd: pytest.CaptureFixture[str]) -> None:
    for argv in (["convert", *RANDOM], ["search", "--target", "0.4"], ["inspect"], ["export"]):
        console.output.cache_clear(), console.errors.cache_clear()
        assert main(argv) == 0
        err = capfd.readouterr().err
        assert err.count("random weights") == 1, argv
        assert err.splitlines()[0].startswith("WARNING: timm:test_resnet has random weights"), argv


@pytest.mark.skipif(importlib.util.find_spec("shtab") is None, reason="shtab is not installed")
@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_every_command(shell: str, nmfx: Run) -> None:
    script = nmfx("--completion", shell)
    for command in COMMANDS:
        assert command in script
    assert "--target-latency" in script
    if shell == "bash":
        asked = 'COMP_WORDS=(nmfx se); COMP_CWORD=1; _shtab_nmfx; echo "${COMPREPLY[@]}"'
        done = subprocess.run(["bash", "-c", f"{script}\n{asked}"], capture_output=True, text=True)
        assert done.stdout.split() == ["search"]


def test_completion_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["--completion", "bash"]) == 1
    assert capsys.readouterr().err == "error: completion needs shtab: pip install 'nmfx[completion]'\n"


def test_every_command_that_shows_has_json() -> None:
    commands = parser().commands()
    shown = {name for name, one in commands.items() if "--json" in one._option_string_actions}
    assert shown == {"inspect", "compare", "evaluate", "bench", "models", "export"}
