"""nmfx compress: one command from a network and pictures to an exported checkpoint, with labels only to report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from nmfx import load_checkpoint, verify
from nmfx.cli.main import main

Run = Callable[..., str]
QUICK = ("compress", "digits", "--data", "digits", "--target", "0.8", "--minutes", "0.01", "--pictures", "96")


def test_from_a_name_and_pictures_to_a_checkpoint(nmfx: Run) -> None:
    out = nmfx(*QUICK)
    assert "96 training pictures, without labels" in out
    assert "agreement with dense" in out
    assert "the result is digits.nmfx/export/digits.safetensors" in out
    model = load_checkpoint("digits.nmfx/export/digits.safetensors")
    assert verify(model).nonzeros < verify(model).weights * 0.25
    dense, exported = (float(_row(out, name)[1].rstrip("%")) for name in ("dense", "exported"))
    assert exported > dense - 10
    again = nmfx(*QUICK)
    assert again.count("skipped, its output is there and still valid") == 6
    other = nmfx(*QUICK[:5], "0.9", *QUICK[6:])
    assert "search: changed: target 0.8 -> 0.9" in other
    for command in (("evaluate", "--data", "digits"), ("inspect",)):
        nmfx(*command)


def test_without_distillation_and_without_labels(nmfx: Run, tmp_path: Path) -> None:
    for index in range(24):
        Image.effect_noise((8, 8), 60 + index).save(tmp_path / f"{index}.png")
    out = nmfx("compress", "digits", "--data", str(tmp_path), "--minutes", "0", "-o", "out.nmfx")
    assert "24 training pictures, without labels" in out
    assert "finetune" not in out.partition("next:")[0]
    assert "evaluate:" not in out
    assert Path("out.nmfx/export/digits.safetensors").is_file()
    out = nmfx("compress", "digits", "--data", str(tmp_path), "--minutes", "0.01", "-o", "two.nmfx")
    assert "finetune:" in out
    assert load_checkpoint("two.nmfx/export/digits.safetensors") is not None


def test_pictures_are_looked_at_before_anything_is_written(
    nmfx: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(30):
        for folder in ("flat", f"classes/c{index % 3}", f"ones/c{index}", "parts/train/a", "few"):
            if folder != "few" or index < 5:
                (tmp_path / folder).mkdir(parents=True, exist_ok=True)
                Image.effect_noise((8, 8), 60 + index).save(tmp_path / folder / f"{index}.png")
    for folder, message in (("few", "expected 16 or more"), ("nowhere", "no data set or folder")):
        assert main(("compress", "digits", "--data", folder, "--minutes", "0", "-o", "no.nmfx")) == 1
        assert message in capsys.readouterr().err
    assert not Path("no.nmfx").exists()
    for folder, why in (
        ("flat", "no class folders"),
        ("classes", "has 3 classes, DigitsNet has 10 outputs"),
        ("ones", "one picture cannot be both"),
        ("parts", "no validation/"),
    ):
        out = nmfx("compress", "digits", "--data", folder, "--minutes", "0", "--pictures", "16", "-o", f"{folder}.nmfx")
        assert f"no evaluation, as there are no labels to do it by: {folder}" in out
        assert why in out
        assert f"the result is {folder}.nmfx/export/digits.safetensors" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("resnet18", "--weights", "none", "--data", "digits"), "random weights, and what comes out would be of no use"),
        (("digits",), "the following arguments are required: --data"),
        (("digits", "--data", "nowhere/"), "no such folder"),
        (("digits", "--data", "digits", "--target", "1.5"), "target"),
        (("digits", "--data", "digits", "--minutes", "-1"), "expected a number, 0 or more"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], nmfx: Run
) -> None:
    with pytest.raises(SystemExit, match=r"[12]"):
        raise SystemExit(main(("compress", *argv)))
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


def _row(out: str, name: str) -> list[str]:
    return next(line for line in out.splitlines() if line.startswith(f"{name} ")).split()
