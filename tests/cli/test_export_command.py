"""nmfx export --compiled, and formats that are added to an earlier export: what is written, and what stays as it is."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import nmfx as library
from nmfx.cli import console
from nmfx.cli.main import main
from nmfx.errors import NmfxError
from nmfx.passes.baking import bake

Run = Callable[..., str]
OUT = Path("digits.nmfx/export")
pytestmark = pytest.mark.usefixtures("quick_times")


@pytest.fixture
def digits(nmfx: Run) -> Path:
    """A work directory of the demo network with a scheme."""
    nmfx("convert", "digits")
    nmfx("search", "--target", "0.75")
    return Path("digits.nmfx")


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def complaint(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 1
    return capsys.readouterr().err


@pytest.mark.parametrize("batch", [1, 3])
def test_a_compiled_model_is_for_the_batch_that_is_said(batch: int, digits: Path, nmfx: Run) -> None:
    said = () if batch == 1 else ("--batch", str(batch))
    assert re.search(r"wrote digits\.nmfx/export/digits\.nmfxc \([\d.]+ [kM]B\)", nmfx("export", "--compiled", *said))
    model, plain = library.load_compiled(OUT / "digits.nmfxc"), bake(library.load_checkpoint(OUT / "digits.safetensors"))
    for count in (1, 2, 3, 8):
        x = torch.randn(count, 1, 8, 8)
        if (count == 1) == (batch == 1):
            with torch.no_grad():
                assert torch.allclose(model(x), plain(x), atol=1e-4)
        else:
            with pytest.raises(NmfxError, match="in batches of"):
                model(x)
    batches = "1," if batch == 1 else "2 to 4096,"
    assert f"digits.nmfxc: float32 1x8x8 in batches of {batches}" in nmfx("inspect", str(OUT / "digits.nmfxc"))


def test_formats_are_added_to_an_export(digits: Path, nmfx: Run, capsys: pytest.CaptureFixture[str]) -> None:
    nmfx("export", "--baked")
    before = contents(OUT)
    out = nmfx("export", "--compiled")
    for name in ("scheme.yaml", "scheme.txt", "digits.safetensors"):
        assert f"kept, as it is the same: {OUT / name} (" in out
    after = contents(OUT)
    assert after.keys() - before.keys() == {"digits.nmfxc"}
    assert {name: after[name] for name in before} == before, "not even written anew"
    assert main(["export", "--onnx"]) == 0
    assert not capsys.readouterr().err, "what was there is of the same export"


def test_what_is_there_is_not_overwritten_by_a_format(digits: Path, nmfx: Run, capsys: pytest.CaptureFixture[str]) -> None:
    nmfx("export", "--compiled")
    before = contents(OUT)
    assert "digits.nmfxc exists already; give --force to overwrite it" in complaint(capsys, "export", "--compiled")
    assert "digits.nmfxc exists already; give --force" in complaint(capsys, "export", "--compiled", "--baked")
    nmfx("search", "--target", "0.5", "--force")
    said = complaint(capsys, "export", "--baked")
    assert "digits.safetensors exists already, of another scheme or other weights; give --force to overwrite it" in said
    assert contents(OUT) == before
    assert main(["export", "--baked", "--force"]) == 0
    assert "digits.nmfxc was there and is not of this export" in " ".join(capsys.readouterr().err.split())
    nmfx("export", "--compiled", "--batch", "2", "--force")
    assert library.load_compiled(OUT / "digits.nmfxc").batch in (1, 2)


def test_a_published_scheme_that_is_there_contradicts_none(nmfx: Run, capsys: pytest.CaptureFixture[str]) -> None:
    nmfx("convert", "digits", "--pattern", "2:4x4")  # which the published format cannot say
    OUT.mkdir()
    (OUT / "scheme.txt").write_text("mine")
    assert "scheme.txt exists already; give --force" in complaint(capsys, "export", "--baked")
    assert [path.name for path in OUT.iterdir()] == ["scheme.txt"]


def test_a_batch_is_of_a_compiled_model(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--batch says nothing without --compiled" in complaint(capsys, "export", "--batch", "2")
    Path("mine.yaml").write_text("model:\n  name: digits\nsearch:\n  target: 0.75\nexport:\n  batch: 2\n")
    assert "mine.yaml: export: 'batch' says nothing without 'compiled: true'" in complaint(capsys, "run", "mine.yaml")


def test_a_recipe_says_the_batch(nmfx: Run) -> None:
    Path("mine.yaml").write_text("model:\n  name: digits\nsearch:\n  target: 0.75\nexport:\n  compiled: true\n  batch: 2\n")
    assert "wrote mine.nmfx/export/digits.nmfxc" in nmfx("run", "mine.yaml")
    with pytest.raises(NmfxError, match="in batches of 2 to 4096"):
        library.load_compiled("mine.nmfx/export/digits.nmfxc")(torch.zeros(1, 1, 8, 8))


def test_compiling_says_how_far_it_is(
    digits: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "FIRST_SECONDS", 0.0)
    monkeypatch.setattr(console, "PIPED_SECONDS", 0.0)
    assert main(["export", "--compiled", "--batch", "2"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "0.0% done: following the model"
    shares = [float(re.match(r"([\d.]+)% done: (timing|following) ", line)[1]) for line in lines]  # type: ignore[index]
    assert shares == sorted(shares)
    assert {line.partition(": ")[2] for line in lines} >= {"timing block2.conv.weight", "timing the whole network"}
