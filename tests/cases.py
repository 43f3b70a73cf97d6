"""Parametrised tables with readable ids, where a case may be a known bug."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pytest


def bug(reason: str) -> pytest.MarkDecorator:
    """The test states a law that the code breaks: it must fail until the code is mended, and this mark removed."""
    return pytest.mark.xfail(strict=True, reason=reason)


def cases(names: Iterable[str], bugs: Mapping[str, str] | None = None, *, arg: str = "name") -> pytest.MarkDecorator:
    """Parametrise `arg` over names; those in `bugs` are known to break the law, for the reason given."""
    marks = {name: [bug((bugs or {})[name])] if name in (bugs or {}) else [] for name in names}
    return pytest.mark.parametrize(arg, [pytest.param(name, id=name, marks=mark) for name, mark in marks.items()])
