"""What the site shows beside docs/: README.md as its first page, CHANGELOG.md as its last, with links that lead from there.

Code in comments, which only the tests run (tests/pages/test_code.py), is left out.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"index.md": "README.md", "changelog.md": "CHANGELOG.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by mkdocs once it has found the files of docs/."""
    for page, source in PAGES.items():
        content = (ROOT / source).read_text().replace("](docs/", "](")
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs with the text of each page."""
    return re.sub(r"<!-- test\n.*?^-->\n", "", markdown, flags=re.MULTILINE | re.DOTALL)
