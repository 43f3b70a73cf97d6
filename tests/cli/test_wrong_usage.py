"""What a user can get wrong, a row each: command, exit code, the line that is shown; no traceback, no file touched."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nmfx.cli import console
from nmfx.cli.main import main

DATA = "--data digits"
ROWS = [
    # The command itself.
    ("--completion fish", 2, "argument --completion: invalid choice: 'fish'"),
    ("serch", 2, "no command is called 'serch' (did you mean 'search'?)"),
    ("search --targt 3", 2, "unknown argument '--targt' (did you mean '--target'?)"),
    ("finetune --epcohs=3 --data x", 2, "unknown argument '--epcohs=3' (did you mean '--epochs'?)"),
    ("convert digits extra", 2, "unknown argument 'extra'"),
    ("search --budget flops", 2, "argument --budget: expected one of params, macs, bytes, latency, found 'flops'"),
    ("finetune", 2, "the following arguments are required: --data"),
    # Numbers: negative, zero, none at all, infinite, huge.
    ("convert digits --classes 0", 2, "argument --classes: expected a whole number, 1 to 1000000, found '0'"),
    ("convert digits --classes 3e9", 2, "found '3e9'"),
    ("convert digits --classes 99999999999", 2, "expected a whole number, 1 to 1000000"),
    ("convert digits --input-size 1x8x99999999999", 1, "--input-size 1x8x99999999999: expected the input without its batch"),
    ("convert digits --input-size 1x99999x99999", 1, "--input-size 1x99999x99999: expected the input without its batch"),
    ("search W --pictures 0", 2, "argument --pictures: expected a whole number, 1 or more, found '0'"),
    ("search W --batch-size -1", 2, "argument --batch-size: expected a whole number, 1 or more, found '-1'"),
    ("search W --workers -1", 2, "argument --workers: expected a whole number, 0 to 256, found '-1'"),
    ("search W --workers 100000", 2, "argument --workers: expected a whole number, 0 to 256, found '100000'"),
    ("search W --seed -1", 2, "argument --seed: expected a whole number"),
    ("search W --seconds nan", 2, "argument --seconds: expected a number, above 0, found 'nan'"),
    ("search W --latency-batch 0", 2, "argument --latency-batch: expected a whole number, 1 to 4096"),
    (f"recalibrate W {DATA} --pictures 1.5", 2, "argument --pictures: expected a whole number, 1 or more, found '1.5'"),
    (f"finetune W {DATA} --lr nan", 2, "argument --lr: expected a number, above 0, found 'nan'"),
    (f"finetune W {DATA} --lr -1", 2, "argument --lr: expected a number, above 0, found '-1'"),
    (f"finetune W {DATA} --lr inf", 2, "argument --lr: expected a number, above 0, found 'inf'"),
    (f"finetune W {DATA} --epochs 1e9", 2, "argument --epochs: expected a whole number, 1 to 1000000, found '1e9'"),
    (f"finetune W {DATA} --epochs 0", 2, "argument --epochs: expected a whole number, 1 to 1000000, found '0'"),
    (f"finetune W {DATA} --momentum 1", 2, "argument --momentum: expected a number, 0 or more and below 1, found '1'"),
    (f"finetune W {DATA} --distill 2", 2, "argument --distill: expected a number, 0 or more and at most 1, found '2'"),
    (f"finetune W {DATA} --accumulate 0", 2, "argument --accumulate: expected a whole number, 1 or more, found '0'"),
    (f"finetune W {DATA} --temperature 0", 2, "argument --temperature: expected a number, above 0, found '0'"),
    ("bench W --turns 0", 2, "argument --turns: expected a whole number, 1 to 100000, found '0'"),
    ("bench W --m 1", 2, "argument --m: expected a whole number, 2 to 64, found '1'"),
    ("bench W --batch 0", 1, "--batch 0: expected whole numbers below 10,000"),
    ("bench W --batch 99999999999", 1, "--batch 99999999999: expected whole numbers below 10,000"),
    ("bench W --threads 1,x", 1, "--threads 1,x: expected whole numbers"),
    ("search W --force --target nan", 1, "target nan: expected a sparsity in 0 <= target < 1"),
    ("search W --force --target -1", 1, "target -1: expected a sparsity in 0 <= target < 1"),
    ("search W --force --target 0x", 1, "target 0x: expected a sparsity"),
    ("search W --force --target 87.5", 1, "target 87.5: expected a sparsity"),
    ("search W --force --m 1", 1, "m = 1: expected a group size in 2..64"),
    ("search W --force --m ''", 2, "expected whole numbers with commas"),
    ("search W --force --candidates -1", 1, "candidate N = -1: expected a whole number in 1..M = 16"),
    ("search W --force --min-density nan", 2, "expected a number, found 'nan'"),
    ("search W --force --limit params=0", 1, "limit 0: expected the share to keep"),
    ("search W --force --limit params", 2, "--limit: params: expected a name and a value"),
    ("search W --force --min-density block*=lots", 2, "argument --min-density: block*: expected a number, found 'lots'"),
    ("search W --force --candidates 1;2", 2, "argument --candidates: expected whole numbers with commas"),
    ("search W --force --m 16,x", 2, "argument --m: expected whole numbers with commas, as in 1,2,4,8, found '16,x'"),
    ("search W --force --limit flops=0.1", 1, "budget 'flops'"),
    # Patterns and sites.
    ("convert digits -o x --pattern 0:4", 1, "'0:4': expected 1 <= N <= M <= 64"),
    ("search W --force --patterns ''", 2, "'' is not an N:M pattern"),
    ("search W --force --patterns 4:2", 2, "did you mean '2:4'?"),
    ("search W --force --keep-dense blok1", 1, "keep-dense: no site matches 'blok1' (did you mean 'block1'"),
    ("search W --force --keep-dense head", 1, "no site matches 'head'; they are stem.conv.weight, block1.conv.weight, ..., "),
    # Options that contradict each other.
    ("convert digits --pattern 2:4 --scheme s.yaml", 2, "argument --scheme: not allowed with argument --pattern"),
    ("convert digits -o x --scheme W/scheme.yaml --layout flat", 1, "--scheme says how groups are cut"),
    ("convert digits -o x --weights none --weights-entry model", 1, "--weights-entry model is of a file: give --weights FILE"),
    ("search W --force --patterns 2:4 --m 4", 1, "--patterns says all patterns"),
    ("search W --force --limit params=0.5 --target 0.5", 1, "--limit says the budget"),
    ("search W --force --limit params=0.5 --limit params=0.4", 1, "one of a kind"),
    ("search W --model resnet18", 1, "give a work directory or --model, not both"),
    ("search W --force --method spdy", 1, "method spdy looks at pictures: give --data"),
    ("search W --force --sensitivity gradeint", 1, "unknown sensitivity 'gradeint' (did you mean 'gradient'?)"),
    (f"finetune W {DATA} --from a --weights none", 1, "give --from or --weights, not both"),
    ("search W --force --for tensorrt --m 16", 1, "--for tensorrt: 4:16 may keep more than 2 of 4 consecutive input channels"),
    ("search W --force --for coreml --target-latency 2x", 1, "--for coreml: times are those of nmfx's own runtime; give --for"),
    ("search W --force --for tensort", 2, "found 'tensort' (did you mean 'tensorrt'?)"),
    ("export W --force --opset 19", 1, "--opset says nothing without --onnx"),
    # Files for folders, folders for files, neither there.
    ("search nowhere", 1, "nowhere: not a work directory, there is no such folder; make one with `nmfx convert nowhere`"),
    ("search W/scheme.yaml", 1, "scheme.yaml: not a work directory, it is a file; did you mean W?"),
    ("search folder", 1, "folder: not a work directory (it has no work.yaml)"),
    ("export notes.txt", 1, "notes.txt: not a work directory, it is a file"),
    ("export W -o notes.txt", 1, "notes.txt: cannot be written"),
    ("export W --scheme folder", 1, "folder: cannot be read as a scheme"),
    ("export W --scheme none.yaml", 1, "none.yaml: no such file"),
    ("convert digits -o notes.txt", 1, "notes.txt exists and is no work directory of nmfx"),
    ("convert digits -o folder --force", 1, "folder exists and is no work directory of nmfx"),
    ("convert digits -o notes.txt/x.nmfx", 1, "notes.txt/x.nmfx: cannot be written"),
    ("convert digits -o W", 1, "W exists already; give --force to replace it"),
    ("convert digits -o x --weights folder", 1, "--weights folder: a folder; expected auto, pretrained, none or a file"),
    ("convert digits -o x --weights pretraned", 1, "--weights pretraned: no such file (did you mean 'pretrained'?)"),
    ("convert digits -o x --weights notes.txt", 1, "notes.txt: cannot be read as weights: it is no file of torch.save"),
    ("convert digits -o x --weights none.pth", 1, "none.pth: no such file"),
    ("convert digits -o x --scheme picture.png", 1, "picture.png: cannot be read as a scheme"),
    ("search W", 1, "scheme.yaml exists already; give --force"),
    ("search W --force -o x.txt", 1, "--out x.txt: expected a name that ends in .yaml"),
    ("search W --force --figure x.gif", 1, "x.gif: a figure is written as .png, .svg, .pdf"),
    ("search W --force --html notes.txt", 1, "notes.txt: a page's name ends in .html"),
    ("search W --force --data nowhere", 1, "no data set or folder is called 'nowhere'"),
    ("search W --force --data folder", 1, "folder: holds nothing to train on: it is empty"),
    ("search W --force --data notes.txt", 1, "notes.txt: not a folder; expected DIR/train/CLASS/*.jpg"),
    ("search W --force --data digits --device gpu", 1, "--device gpu: "),
    (f"recalibrate W {DATA} --scheme notes.txt", 1, "notes.txt: expected a YAML mapping"),
    (f"recalibrate W {DATA} -o notes.txt --pictures 8", 1, "notes.txt/model.safetensors: cannot be written"),
    (f"recalibrate W {DATA} --pictures 5000", 1, "digits: 5000 pictures for calibration, but only 1198 for training"),
    (f"correct W {DATA} --method adm", 2, "did you mean 'admm'"),
    (f"correct W {DATA} --scheme notes.txt", 1, "notes.txt: expected a YAML mapping"),
    (f"correct W {DATA} -o notes.txt --pictures 8", 1, "notes.txt/state.safetensors: cannot be written"),
    (f"correct W {DATA} --pictures 5000", 1, "digits: 5000 pictures for calibration, but only 1198 for training"),
    (f"finetune W {DATA} --scheme none.yaml", 1, "none.yaml: no scheme there"),
    (f"finetune W {DATA} --from none.safetensors -o f", 1, "none.safetensors: no such file"),
    (f"evaluate none.pth {DATA}", 1, "none.pth: no such file"),
    (f"evaluate none.nmfx {DATA}", 1, "none.nmfx: no such file or directory"),
    (f"evaluate no/where {DATA}", 1, "no/where: no such file or directory"),
    (f"evaluate picture.png {DATA}", 1, "picture.png: plain weights; give --model NAME"),
    (f"evaluate W {DATA} --input-size 3x8x8", 1, "dense: the forward pass fails on pictures of 3x8x8: "),
    (f"evaluate W {DATA} --reference none.nmfx", 1, "none.nmfx: no such file or directory"),
    ("bench none.nmfx", 1, "none.nmfx: no such file or directory"),
    ("bench notes.txt", 1, "notes.txt: plain weights; bench takes a compressed checkpoint"),
    ("bench W --figure x.doc", 1, "x.doc: a figure is written as"),
    ("run nowhere", 1, "no recipe file is called 'nowhere'"),
    ("run digit", 1, "no recipe file is called 'digit' (did you mean 'digits'?)"),
    ("run digits -o notes.txt", 1, "notes.txt exists, and is no work directory of nmfx"),
    ("run digits --until nothing", 2, "argument --until: invalid choice: 'nothing'"),
    ("inspect picture.png", 1, "picture.png: cannot be read as a scheme"),
    ("inspect none.safetensors", 1, "none.safetensors: no such file"),
    ("inspect folder", 1, "folder: not a work directory (it has no work.yaml)"),
    ("compare W/scheme.yaml", 1, "compare needs two schemes or more"),
    ("compare W none.yaml", 1, "none.yaml: no such file"),
    ("compare W notes.txt", 1, "notes.txt: expected a YAML mapping"),
    # Models by name.
    ("convert ''", 1, "no model is called ''"),
    ("convert vit_small", 1, "nearest: timm:vit_small_patch"),
    ("convert mobilenet_v3", 1, "torchvision:mobilenet_v3_large"),
    ("convert ResNet50", 1, "nearest: torchvision:resnet50, timm:resnet50"),
    ("inspect timm/resnt18", 1, "nearest: timm:resnet18"),
    (
        "convert hf-hub:me/mine",
        1,
        "no model is called 'hf-hub:me/mine' in torchvision or timm, and nmfx takes none from a hub",
    ),
    ("convert digits -o x --classes 3", 1, "demo:digits cannot be built with num_classes=3: "),
    ("models zzzzz", 1, "no model of torchvision or timm matches 'zzzzz'"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a searched work directory W, a note, a picture and an empty folder."""
    folder = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for argv in (["convert", "digits", "-o", "W"], ["search", "W"]):
            for function in (console.output, console.errors):
                function.cache_clear()
            assert main(argv) == 0
        Path("notes.txt").write_text("my notes\n")
        Path("picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\xff")
        Path("folder").mkdir()
        yield folder


def listing(folder: Path) -> dict[str, Any]:
    return {str(p): p.stat().st_mtime_ns if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize(("command", "code", "line"), ROWS, ids=[row[0] or "nothing" for row in ROWS])
def test_a_mistake_is_one_line(
    command: str, code: int, line: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    before = listing(place)
    try:
        found = main(shlex.split(command))
    except SystemExit as stop:
        found = int(stop.code or 0)
    said = capsys.readouterr().err
    assert found == code, said
    assert line in said
    lines = said.splitlines()
    assert lines[0].startswith("error: ")
    assert len(lines) == (2 if code == 2 else 1)
    assert code == 1 or lines[1].startswith("usage: nmfx ")
    assert not any(word in said for word in ("Traceback", "error: unexpected", "\x1b"))
    assert listing(place) == before
