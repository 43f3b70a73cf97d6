"""A YAML file as a Recipe: every key known, every text parsed by the type of its field (YAML 1.2 numbers), once, here."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import nmfx
from nmfx import text
from nmfx.errors import NmfxError
from nmfx.files import parsing
from nmfx.recipe.schema import Recipe
from nmfx.settings.option import section, shown

HOME = Path(nmfx.__file__).parent
PACKAGED = (HOME / "recipes", HOME.parent / "recipes")  # installed; in the repository


def packaged_recipes() -> dict[str, Path]:
    """The recipes that come with nmfx, by name."""
    folder = next((folder for folder in PACKAGED if folder.is_dir()), PACKAGED[0])
    return dict(sorted((path.name.removesuffix(".yaml"), path) for path in folder.glob("*.yaml")))


def find_recipe(name: str | Path, *, beside: Path | None = None) -> Path:
    """The file of a recipe: a path, a name `beside` another recipe, or the name of one that comes with nmfx.

    Raises:
        NmfxError: there is none; the message lists the names.
    """
    near = [beside / f"{name}.yaml"] if beside is not None else [Path(name)]
    with contextlib.suppress(OSError, ValueError):  # too long for a file's name, or no name at all
        if found := next((path for path in near if path.is_file()), None):
            return found
    known = packaged_recipes()
    if str(name) not in known:
        raise NmfxError(f"no recipe file is called {str(name)!r}{text.nearest(str(name), known)}; packaged: {', '.join(known)}")
    return known[str(name)]


def load_recipe(path: str | Path, *, data_root: str | None = None) -> Recipe:
    """Read a recipe file. One with ``base: NAME`` changes single keys of another recipe; ``null`` takes a key of it away.

    Args:
        data_root: where the pictures are, whatever the file says.

    Paths in a recipe are relative to the current folder, as on the command line.

    Raises:
        NmfxError: naming the file, the key, what was expected and the nearest known key.
    """
    path = find_recipe(path)
    tree = _read(path)
    if "base" in tree:
        if not isinstance(tree["base"], str) or not re.fullmatch(r"[\w.+-]{1,100}", tree["base"]):
            raise NmfxError(f"{path}: base: expected the name of a recipe beside it or of nmfx, found {shown(tree['base'])}")
        try:
            start = find_recipe(tree["base"], beside=path.parent)
        except NmfxError as error:
            raise NmfxError(f"{path}: base: {error}") from error
        base = _read(start)
        if "base" in base:
            raise NmfxError(
                f"{path}: base: {tree['base']} has a base itself; start from {base['base']!r}, one level is allowed"
            )
        section(_merged({}, base), Recipe, str(start))  # its errors are not this file's
        tree = _merged(base, {key: value for key, value in tree.items() if key != "base"})
    recipe = section(_merged({}, tree), Recipe, str(path))
    if data_root is None:
        return recipe
    if recipe.data is None:
        raise NmfxError(f"{path}: --data-root {data_root}: this recipe has no data section")
    return replace(recipe, data=replace(recipe.data, root=data_root))


def _read(path: Path) -> dict[str, Any]:
    return parsing.yaml_tree(parsing.read_text(path, "a recipe"), str(path))


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `changes`, section by section; what is null goes (as in RFC 7396)."""
    result = dict(base)
    for key, value in changes.items():
        before = result.get(key)
        result[key] = _merged(before if isinstance(before, dict) else {}, value) if isinstance(value, dict) else value
    return {key: value for key, value in result.items() if not _is_null(value)}


def _is_null(value: Any) -> bool:
    return isinstance(value, str) and value in ("null", "~")
