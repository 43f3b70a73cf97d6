"""The examples of docs/contributing.md, pasted into the one file that each names."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
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
from nmfx.settings.stages import FinetuneSettings
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
