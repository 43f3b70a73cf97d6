"""Every block of code on a page runs, in the order of the page, on a small network and 66 small pictures.

What the reader has and a test has not is replaced in sight (`SMALLER`): a large network by timm's smallest, pretrained weights
by random ones, minutes by seconds. A comment ``<!-- test ... -->`` is code that checks the blocks above it; what a page needs
beforehand is in page_files.py.
"""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from folders import make_split
from page_files import BEFORE

from nmfx.cli import bench
from nmfx.cli.main import main

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^( *)```(python|console)[^\n]*\n(.*?)^ *```$|^<!-- test\n(.*?)^-->$", re.MULTILINE | re.DOTALL)
ELSEWHERE = {"docs/contributing.md": "tests/test_contributing.py"}
SMALLER = {
    "resnet50": "test_resnet",
    "pretrained=True": "pretrained=False",
    "--classes 3": "--classes 3 --input-size 64",
    "--minutes 10": "--minutes 0.02",
    "--epochs 30": "--epochs 1 --batch-size 16",
    "epochs=30": "epochs=1, batch_size=16",
}
NOT_HERE = ("$ pip ", "$ make ", "$ torchrun ", "$ python benchmarks/", "$ git ", "$ cd ")  # their words are checked apart


def pages() -> dict[str, list[tuple[str, str]]]:
    """Blocks of each page that has any: (language, content); Python begins on the line on which it begins on the page."""
    found = {}
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        blocks, text = [], path.read_text()
        for block in BLOCK.finditer(text):
            indent, language, content, check = block.groups()
            lines = "\n" * (text.count("\n", 0, block.start()) + 1)
            code = re.sub(f"^{indent}", "", content, flags=re.MULTILINE) if language else check
            blocks.append((language or "python", code if language == "console" else lines + code))
        name = str(path.relative_to(ROOT))
        if blocks and name not in ELSEWHERE:
            found[name] = blocks
    return found


PAGES = pages()


def smaller(code: str) -> str:
    for old, new in SMALLER.items():
        code = code.replace(old, new)
    return code


@pytest.mark.filterwarnings("ignore::Warning:lightning.*")
@pytest.mark.filterwarnings("ignore::Warning:transformers.*")
@pytest.mark.filterwarnings("ignore::Warning:accelerate.*")
@pytest.mark.usefixtures("quick_times")
@pytest.mark.parametrize("name", PAGES)
def test_code_on_a_page_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(bench, "time_pair", lambda *args: (None, []))  # a minute of compiling: test_bench_command has it
    monkeypatch.setattr(bench, "_show", lambda *args: None)
    make_split(tmp_path / "photos", train=16, validation=6)
    names: dict[str, Any] = {"__name__": "__main__", "PAGE": str(ROOT / name)}
    exec(compile(BEFORE.get(name, ""), f"before {name}", "exec"), names)
    for language, block in PAGES[name]:
        if language == "python":
            if "import coremltools" in block and find_spec("coremltools") is None:
                pytest.skip("coremltools is not installed")
            exec(compile(smaller(block), ROOT / name, "exec"), names)
            continue
        for line in re.sub(r" *\\\n *", " ", block).splitlines():
            if line.startswith("$ nmfx "):
                argv = shlex.split(smaller(line), comments=True)[2:]
                assert main(argv) == 0, f"{line}\n{capsys.readouterr().err}"
            else:
                assert line.startswith(NOT_HERE) or not line.startswith("$"), line


def test_pages_name_targets_and_extras_that_are_there() -> None:
    make = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    project = (ROOT / "pyproject.toml").read_text()
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        content = path.read_text()
        assert set(re.findall(r"^ *\$ make ([\w-]+)", content, re.MULTILINE)) <= make, path
        for extras in re.findall(r"(?:nmfx|\.)\[([\w,-]+)\]", content):
            for extra in extras.split(","):
                assert re.search(rf"^{extra} = \[", project, re.MULTILINE), f"{path}: {extra}"
        for script in re.findall(r"python (benchmarks/\w+\.py|examples/\w+\.py)", content):
            assert (ROOT / script).is_file(), f"{path}: {script}"
