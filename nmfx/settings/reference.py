"""The reference pages of every option and platform, docs/options.md and docs/platforms.md: python -m nmfx.settings.reference"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, Field
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

from nmfx.settings.flags import name_of
from nmfx.settings.option import about, is_mapping, is_settings, kinds_of, typed_fields
from nmfx.settings.platforms import PLATFORMS
from nmfx.settings.search import SearchSettings
from nmfx.settings.stages import (
    BenchSettings,
    CompressSettings,
    CorrectSettings,
    DataSettings,
    EvaluateSettings,
    ExportSettings,
    FinetuneSettings,
    ModelSettings,
    RecalibrateSettings,
)

PAGE = Path(__file__).parents[2] / "docs" / "options.md"
PLACES = PAGE.with_name("platforms.md")
MARK = "<!-- below: written by hand -->\n"
SECTIONS: dict[str, tuple[type, str]] = {  # a recipe's section or a command: its settings, and the commands with its flags
    "model": (ModelSettings, "convert"),
    "data": (DataSettings, "search, correct, recalibrate, finetune, evaluate"),
    "search": (SearchSettings, "search"),
    "correct": (CorrectSettings, "correct"),
    "finetune": (FinetuneSettings, "finetune"),
    "export": (ExportSettings, "export"),
    "evaluate": (EvaluateSettings, "evaluate"),
    "recalibrate": (RecalibrateSettings, "recalibrate"),
    "compress": (CompressSettings, "compress"),
    "bench": (BenchSettings, "bench"),
}
ALONE = ("recalibrate", "compress", "bench")  # commands that no recipe has
HEAD = """# Options

Every option of stages, written from the definitions in `nmfx/settings/` by `python -m nmfx.settings.reference`; a test
holds this page to them. A flag and a recipe's key are one option, with one type, default and limit; `-` says that there
is no such flag or key. The help says the unit. Flags of a command that choose files (`--out`, `--force`, `--figure`) are
in its `--help`.
"""
COLUMNS = "| flag | key | type | default | what it is |\n|---|---|---|---|---|\n"


def reference() -> str:
    """The page, in Markdown."""
    parts = [HEAD]
    for name, (cls, commands) in SECTIONS.items():
        said = " ".join((cls.__doc__ or "").partition("\n\n")[0].split())
        parts.append(f"\n## {name}\n\n{said} Flags of `nmfx {commands}`.\n\n{COLUMNS}")
        parts += [_row(item, kind, "" if name in ALONE else f"{name}.{key}") for key, item, kind in _options(cls)]
    return "".join(parts)


PLACES_HEAD = """# Platforms

Where a network is to run decides which patterns are worth anything. `nmfx search --for NAME` offers sites what runs faster
there and leaves the others dense; an option that contradicts it is an error. `nmfx export --for NAME` writes the format that
is taken there, and says of every site whether it will run sparse, and why not (`--json` for programs). Down to the mark this
page is written from `nmfx/settings/platforms.py` by `python -m nmfx.settings.reference`.

| `--for` | what runs faster | patterns offered | export |
|---|---|---|---|
"""


def platforms() -> str:
    """The page of the platforms, in Markdown, up to what is written by hand."""
    rows, parts = [], []
    for name, one in PLATFORMS.items():
        offered = ", ".join(one.patterns) or "those of `--m`, `--patterns`"
        rows.append(f"| `{name}` | {one.gain} | {offered} | `--{one.format}` |\n")
        sources = "\n".join(f"- <{source}>" if source.startswith("http") else f"- {source}" for source in one.sources)
        parts.append(f"\n## {name}: {one.label}\n\nChecked: {one.checked}.\n\nThen: `{one.then}`\n\n{sources}\n")
    return "".join((PLACES_HEAD, *rows, *parts, f"\n{MARK}"))


def _options(cls: type, prefix: str = "", without: tuple[str, ...] = ()) -> Iterator[tuple[str, Field[Any], Any]]:
    """The options of a class with their keys, those of settings inside it among them."""
    for item, kind, said in typed_fields(cls):
        if item.name in without:
            continue
        if is_settings(kind):
            yield from _options(kind, prefix if said.inline else f"{prefix}{item.name}.", said.without)
        else:
            yield f"{prefix}{item.name}", item, kind


def _row(item: Field[Any], kind: Any, key: str) -> str:
    said = about(item)
    flag = "-" if said.flag is None else f"`{name_of(item)}`"
    numbers = [one for one in kinds_of(kind) if one in (int, float)]
    limits = said.limits(int in numbers and float not in numbers) if numbers else ""
    cells = (flag, f"`{key}`" if key else "-", _type(kind) + (f", {limits}" if limits else ""), _default(item), said.help)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _type(kind: Any) -> str:
    words = []
    for one in kinds_of(kind):
        if get_args(one) and get_origin(one) is tuple:
            words.append(f"list of {_type(get_args(one)[0])}")
        elif is_mapping(one):
            words.append(f"names with {_type(get_args(one)[1])}")
        elif get_args(one):
            words.append(", ".join(get_args(one)))
        elif one is not NoneType:
            words.append(
                {int: "whole number", float: "number", bool: "true or false", str: "text"}.get(
                    one, "N:M" if one is not Any else "any"
                )
            )
    return " or ".join(words)


def _default(item: Field[Any]) -> str:
    value = item.default
    if value is MISSING:
        return "needed"
    if isinstance(value, bool):
        return str(value).lower()
    if value is None or value in ("", ()):
        return "none"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    PAGE.write_text(reference())
    PLACES.write_text(platforms() + PLACES.read_text().partition(MARK)[2])
