"""nmfx search with limits, bounds and pictures, as a user types it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nmfx.cli.main import main
from nmfx.demo.digits import load_demo
from nmfx.models.census import find_sites
from nmfx.scheme import Scheme
from nmfx.sparsity.pattern import Pattern

Run = Callable[..., tuple[str, str]]


@pytest.fixture
def nmfx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in an empty folder: its output and its errors; it must succeed, unless `fails`."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: str, fails: bool = False) -> tuple[str, str]:
        assert main(list(argv)) == (1 if fails else 0)
        return capsys.readouterr()  # type: ignore[return-value]

    return run


def scheme() -> Scheme:
    return Scheme.load(Path("digits.nmfx/scheme.yaml"), find_sites(load_demo(trained=True)))


def test_times_fewer_is_a_target(nmfx: Run) -> None:
    out, _ = nmfx("search", "--target", "4x", "--method", "knapsack")
    sites = find_sites(load_demo(trained=True))
    assert scheme().totals(sites).sparsity >= 0.75
    assert "budget: 9,284 weights" in out


@pytest.mark.parametrize("target", ["0", "0.0", "1x"])
def test_a_target_of_nothing_is_a_target(target: str, nmfx: Run) -> None:
    nmfx("search", "--target", target, "--m", "32")
    assert scheme().totals(find_sites(load_demo(trained=True))).sparsity == 0


def test_two_limits_are_reported_and_held(nmfx: Run) -> None:
    out, _ = nmfx("search", "--limit", "params=0.3", "--limit", "macs=2x", "--method", "knapsack")
    totals = scheme().totals(find_sites(load_demo(trained=True)))
    assert totals.kept <= 0.3 * totals.weights
    assert totals.kept_macs <= 0.5 * totals.macs
    assert out.count("budget: ") == 2
    assert " MACs, " in out


def test_bounds_and_patterns(nmfx: Run) -> None:
    nmfx("search", "--target", "0.3", "--patterns", "2:4", "--method", "knapsack")
    assert set(scheme().values()) == {Pattern("2:4")}
    nmfx("search", "--target", "0.5", "--m", "8,16", "--min-density", "0.25", "--min-density", "block3*=0.5", "--force")
    chosen = scheme()
    assert all(p.density >= (0.5 if name.startswith("block3") else 0.25) for name, p in chosen.items())


@pytest.mark.parametrize("sensitivity", ["activation", "corrected", "gradient", "measured"])
def test_sensitivities_look_at_pictures(sensitivity: str, nmfx: Run) -> None:
    out, _ = nmfx("search", "--method", "knapsack", "--sensitivity", sensitivity, "--data", "digits", "--pictures", "64")
    assert f"knapsack ({sensitivity}):" in out
    _, err = nmfx("search", "--method", "knapsack", "--sensitivity", sensitivity, "--force", fails=True)
    assert "looks at pictures: give --data" in err


def test_whole_schemes_are_tried(nmfx: Run) -> None:
    out, _ = nmfx("search", "--method", "spdy", "--data", "digits", "--pictures", "64", "--seconds", "1", "--events")
    assert "schemes tried" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--target", "much"], "target much: expected a sparsity"),
        (["--limit", "weights=0.5"], "budget 'weights'"),
        (["--data", "digit"], "did you mean 'digits'"),
        (["--data", "fashion-mnist-folder"], "no data set or folder"),
        (["--device", "quantum"], "--device quantum"),
        (["--limit", "params=0.5", "--limit", "params=0.3"], "one of a kind"),
        (["--limit", "params=0.5", "--target", "4x"], "leave --target and --budget out"),
        (["--patterns", "2:4", "--m", "8"], "leave --m, --candidates and --vector out"),
        (["--sensitivity", "gradient", "--method", "domino"], "add --method knapsack"),
        (["--sensitivity", "gradient"], "sensitivity gradient looks at pictures: give --data"),
        (["--no-eta"], "--no-eta is of the published loop: it needs --method domino with --data"),
        (["--target-latency", "2x", "--method", "domino"], "method domino counts parameters, MACs or bytes"),
        (["--target-latency", "2x", "--budget", "macs"], "leave --target, --budget and --limit out"),
        (["--target-latency", "fast"], "target fast: expected a sparsity"),
        (["--method", "erk", "--data", "digits"], "looks at no pictures"),
        (["--figure", "a.bmp"], "a.bmp"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_says_why_and_writes_nothing(argv: list[str], message: str, nmfx: Run) -> None:
    nmfx("convert", "digits")
    before = sorted(Path().rglob("*"))
    _, err = nmfx("search", *argv, fails=True)
    assert message in err
    assert sorted(Path().rglob("*")) == before
