"""The examples of docs/contributing.md, pasted into the one file that each names."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SECTIONS = re.findall(
    r"^## (\w+)\n.*?```python\n# (nmfx/\S+\.py)\n(.*?)```\n.*?```python\n(.*?)```",
    (ROOT / "docs/contributing.md").read_text(),
    re.MULTILINE | re.DOTALL,
)
BEFORE = """
import torch
from torch import nn
import nmfx
from nmfx.settings.search import SearchSettings
from nmfx.settings.stages import ExportSettings, FinetuneSettings
from nmfx.recipe.loader import section

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 32), nn.ReLU(), nn.Linear(32, 4))
batches = [(torch.randn(8, 8, 8, 8), torch.arange(8) % 4) for _ in range(4)]
sites = nmfx.find_sites(model, batches[0][0])
"""
AFTER = {  # that flags and keys know the name
    "Score": 'section({"score": "relative"}, FinetuneSettings, "recipe")',
    "Method": 'section({"method": "largest-first"}, SearchSettings, "recipe")',
    "Sensitivity": 'section({"sensitivity": "absolute"}, SearchSettings, "recipe")',
    "Rule": 'section({"training": "strong-sr-ste"}, FinetuneSettings, "recipe")',
    "Format": 'import numpy; numpy.load("digits.nmfx/export/digits.npz"); section({"npz": "true"}, ExportSettings, "recipe")',
    "Platform": 'section({"platform": "my-npu"}, ExportSettings, "recipe")',
    "Option": "",
}


def test_every_kind_has_an_example() -> None:
    assert [name for name, *_ in SECTIONS] == list(AFTER)


@pytest.mark.parametrize(("name", "path", "entry", "use"), SECTIONS, ids=[name for name, *_ in SECTIONS])
def test_an_example_works_in_the_one_file_it_names(name: str, path: str, entry: str, use: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "nmfx", tmp_path / "nmfx", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / path).open("a") as file:
        file.write(f"\n\n{entry}")
    script = f"{BEFORE}\nassert nmfx.__file__.startswith({str(tmp_path)!r})\n{use}\n{AFTER[name]}\n"
    done = subprocess.run(  # a process of its own: the package is another one
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr


PLACES = (  # of the five blocks of the operator's example: the file, and what each is written before
    ("operators.py", "def padded("),
    ("operators.py", '    Operator("flatten"'),
    ("kernel/operators.h", "// (batch, ...) to (batch, features)"),
    ("lowering/replacement.py", "    aten.mean.dim: _mean,\n"),
)
IMPORTS = """
import torch
from torch import nn
from nmfx.runtime.chain import link
from nmfx.runtime.kernel.library import load_kernel
from nmfx.runtime.layers import sparse_layer
from nmfx.runtime.layout.tiles import Tile
from nmfx.runtime.lowering.exporting import export
from nmfx.runtime.lowering.fusion import lower
from nmfx.runtime.operators import OPERATORS
"""


@pytest.mark.slow
def test_the_operator_works_in_the_three_files_it_names(tmp_path: Path) -> None:
    page = (ROOT / "docs/contributing.md").read_text().partition("## Operator\n")[2]
    blocks = [textwrap.dedent(block) for block in re.findall(r"```\w+\n(.*?)\n *```", page, re.DOTALL)]
    shutil.copytree(ROOT / "nmfx", tmp_path / "nmfx", ignore=shutil.ignore_patterns("__pycache__"))
    for block, (name, before) in zip(blocks, PLACES, strict=False):
        path = tmp_path / "nmfx/runtime" / name
        content, indent = path.read_text(), " " * (len(before) - len(before.lstrip()))
        assert content.count(before) == 1
        path.write_text(content.replace(before, f"{textwrap.indent(block, indent)}\n{'' if indent else chr(10)}{before}"))
    table = tmp_path / "nmfx/runtime/kernel/kernel.cpp"
    table.write_text(table.read_text().replace("DO(lanes_average)\n", "DO(lanes_average) DO(hardswish)\n"))
    build = tmp_path / "build"
    subprocess.run(["cmake", "-S", table.parent, "-B", build, "-DCMAKE_CXX_FLAGS_RELEASE=-O1"], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", build, "-j2"], check=True, capture_output=True)
    test = f"{IMPORTS}\n{blocks[-1]}\n\ntest_hardswish_is_part_of_a_chain()\n"
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", test], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
