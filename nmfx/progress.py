"""How long work says how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[..., None]  # called with the share of the work done (0..1) and a line of text; lasting=True: one to keep


def silent(share: float, line: str = "", *, lasting: bool = False) -> None:
    """A `Progress` that shows nothing."""
