"""Laws of `nmfx models`: names by glob or part, rows as measured, what was not measured says so, an error names the nearest."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nmfx.cli import console, models
from nmfx.cli.main import main
from nmfx.errors import ModelError, TraceError
from nmfx.models.source import Source, list_models, matching, versions
from nmfx.models.table import Entry, Table
from nmfx.text import percent

KNOWN = ["torchvision:resnet18", "torchvision:vit_b_16", "timm:resnet18", "timm:test_vit", "timm:vit_tiny", "demo:digits"]
ENTRIES = [
    Entry("torchvision:resnet18", 11_689_512, 21, 11_678_912, 1_814_073_344, 1, 1.0, "exact"),
    Entry("torchvision:vit_b_16", 86_567_656, 50, 86_376_448, 17_000_000_000, 7, 0.998),
    Entry("timm:resnet18", 11_689_512, 21, 11_678_912, 1_814_073_344, 0, 0.0, "eval"),
]


@pytest.fixture(autouse=True)
def consoles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Consoles that write to what pytest captures, a small table, and few names."""
    for name in ("COLUMNS", "FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    table = Table("2026-01-31", versions(), {entry.model: entry for entry in ENTRIES})
    monkeypatch.setattr(models, "load_table", lambda: table)
    monkeypatch.setattr(models, "list_models", lambda: KNOWN)
    for function in (console.output, console.errors):
        function.cache_clear()
    yield
    for function in (console.output, console.errors):
        function.cache_clear()


def lines(capsys: pytest.CaptureFixture[str], *argv: str) -> list[list[str]]:
    """The words of each line of a command that works."""
    assert main(["models", *argv]) == 0
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    return [line.split() for line in captured.out.splitlines()]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*", KNOWN),
        ("", KNOWN),
        ("resnet", ["torchvision:resnet18", "timm:resnet18"]),
        ("RESNET", ["torchvision:resnet18", "timm:resnet18"]),
        ("timm:resnet", ["timm:resnet18"]),
        ("vit", ["torchvision:vit_b_16", "timm:test_vit", "timm:vit_tiny"]),
        ("vit_*", ["torchvision:vit_b_16", "timm:vit_tiny"]),
        ("timm:vit_*", ["timm:vit_tiny"]),
        ("*:vit_*", ["torchvision:vit_b_16", "timm:vit_tiny"]),
        ("resnet1[58]", ["torchvision:resnet18", "timm:resnet18"]),
        ("vit_b_1?", ["torchvision:vit_b_16"]),
        ("timm", ["timm:resnet18", "timm:test_vit", "timm:vit_tiny"]),
        ("timm:", ["timm:resnet18", "timm:test_vit", "timm:vit_tiny"]),
        ("vision", ["nothing"]),
    ],
)
def test_a_pattern_matches(pattern: str, names: list[str]) -> None:
    if names == ["nothing"]:  # the prefix is no part of a name
        with pytest.raises(ModelError):
            matching(pattern, KNOWN)
    else:
        assert matching(pattern, KNOWN) == names


def test_every_known_name_matches_itself() -> None:
    names = list_models()
    assert all(name in matching(name, names) for name in names[::50])


def test_rows_are_as_measured(capsys: pytest.CaptureFixture[str]) -> None:
    head, *rows, foot = lines(capsys)
    assert head == ["model", "parameters", "sites", "covered", "fx", "CPU"]
    assert rows[:4] == [
        ["torchvision:resnet18", "11.7M", "21", "99.9%", "100%", "exact"],
        ["torchvision:vit_b_16", "86.6M", "50", "99.8%", "7", "parts,", "99.8%", "-"],
        ["timm:resnet18", "11.7M", "21", "99.9%", "none", "eval"],
        ["timm:test_vit", "not", "measured"],
    ]
    assert " ".join(foot).startswith("6 of 6 models; measured 2026-01-31 with python ")
    assert "installed now" not in foot


def test_the_footer_counts_what_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    *_, foot = lines(capsys, "timm:*")
    assert foot[:5] == ["3", "of", "6", "models;", "measured"]


def test_other_versions_than_the_tables_are_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "versions", lambda: {**versions(), "timm": "9.9"})
    *_, foot = lines(capsys)
    assert " ".join(foot).endswith("; installed now: timm 9.9")


def test_eighty_columns_hold_every_row(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(models, "list_models", lambda: [*KNOWN, "torchvision:fasterrcnn_mobilenet_v3_large_320_fpn"])
    assert main(["models"]) == 0
    rows = capsys.readouterr().out.splitlines()[:-1]
    assert all(len(row) <= 80 for row in rows)
    joined = "".join(row.split()[0] for row in rows)
    assert "torchvision:fasterrcnn_mobilenet_v3_large_320_fpn" in joined  # folded, not cut
    assert "..." not in joined
    assert "…" not in joined


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [("resnt18", "torchvision:resnet18"), ("timm:vit_tny*", "timm:vit_tiny"), ("qqqqqqq", "`nmfx models` lists them all")],
)
def test_no_match_is_an_error_with_the_nearest(pattern: str, nearest: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", pattern]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: no model of torchvision or timm matches '{pattern}'; ")
    assert nearest in captured.err
    assert captured.err.count("\n") == 1


def test_measure_measures_what_was_not(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def measure(source: Source) -> Entry:
        asked.append(str(source))
        if str(source) == "timm:vit_tiny":
            raise TraceError("vit_tiny: the forward pass fails")
        return Entry(str(source), 1000, 3, 900, 5, 1, 1.0)

    monkeypatch.setattr(models, "measure", measure)
    monkeypatch.setattr(models, "find_source", lambda name: Source(*name.split(":")))
    assert main(["models", "timm:", "--measure"]) == 0
    captured = capsys.readouterr()
    assert asked == ["timm:test_vit", "timm:vit_tiny"]
    rows = [line.split() for line in captured.out.splitlines()]
    assert ["timm:test_vit", "1k", "3", "90.0%", "100%", "-"] in rows
    assert ["timm:vit_tiny", "not", "measured"] in rows
    assert captured.err == "warning: timm:vit_tiny cannot be measured: TraceError: vit_tiny: the forward pass fails\n"


@pytest.mark.filterwarnings("ignore")  # of the models themselves
def test_a_real_model_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert lines(capsys, "timm:test_vit", "--measure")[1] == ["timm:test_vit", "371k", "26", "96.7%", "100%", "-"]


@pytest.mark.parametrize(("share", "text"), [(1.0, "100%"), (0.99999, "99.9%"), (0.998, "99.8%"), (0.0, "0.0%")])
def test_all_of_it_is_never_a_rounded_figure(share: float, text: str) -> None:
    assert percent(share) == text
