"""The site: every page is in its contents, every public name in its reference, and it builds without a warning."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import nmfx

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
GENERATED = {"index.md": "README.md", "changelog.md": "CHANGELOG.md"}  # by docs/hooks.py


def leaves(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [leaf for entry in (nav.values() if isinstance(nav, dict) else nav) for leaf in leaves(entry)]


def test_pages_and_contents_agree() -> None:
    said = leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert len(said) == len(set(said))
    assert set(said) == {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")} | GENERATED.keys()


def test_every_public_name_is_in_the_reference() -> None:
    said = re.findall(r"^::: nmfx\.(\w+)$", (DOCS / "reference.md").read_text(), re.MULTILINE)
    assert sorted(said) == sorted(nmfx.__all__)


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Also in the files as they lie in the repository, not only on the site."""
    content = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", content):
        if "://" not in link:
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "site/reference.html").read_text()
    assert all(f'id="nmfx.{name}"' in reference for name in nmfx.__all__)
    front = (tmp_path / "site/index.html").read_text()
    assert 'href="guides/own-network.html"' in front
    assert "docs/guides" not in front
