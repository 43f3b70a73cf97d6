"""nmfx's types hold for its users: consumer.py passes mypy --strict beside an nmfx that is installed."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import venv
from pathlib import Path

import nmfx

ROOT = Path(__file__).parents[2]
CONSUMER = Path(__file__).with_name("consumer.py")


def mypy(script: Path, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Check a script as a program of its own, in an environment whose site-packages have this nmfx and all it needs."""
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv/bin/python"
    packages = next((tmp_path / "venv/lib").iterdir()) / "site-packages"
    installed = [path for path in sys.path if Path(path).name == "site-packages"]
    (packages / "here.pth").write_text("\n".join([str(ROOT), *installed]))
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", python, "--config-file", os.devnull]
    cache = ROOT / ".mypy_cache/consumer"
    return subprocess.run(
        [*command, "--cache-dir", cache, script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": ""},
    )


def test_a_users_program_passes_mypy_strict(tmp_path: Path) -> None:
    done = mypy(CONSUMER, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "import nmfx\nfrom torch import nn\n\ndef f(model: nn.Module) -> int:\n    return nmfx.transform(model, 'x', wrong=1)\n"
    )
    found = mypy(wrong, tmp_path).stdout
    assert 'Unexpected keyword argument "wrong"' in found, found
    assert 'expected "int"' in found, found


def test_the_program_uses_every_public_name() -> None:
    tree = ast.walk(ast.parse(CONSUMER.read_text()))
    used = {n.attr for n in tree if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "nmfx"}
    assert used == set(nmfx.__all__)
