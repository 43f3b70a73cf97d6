"""Parametrised tables with readable ids."""

from __future__ import annotations

from collections.abc import Iterable

import pytest


def cases(names: Iterable[str], *, arg: str = "name") -> pytest.MarkDecorator:
    """Parametrise `arg` over the names of a table."""
    return pytest.mark.parametrize(arg, list(names))
