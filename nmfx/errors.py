"""What goes wrong, as one small family: every error nmfx raises on purpose is an NmfxError."""

from __future__ import annotations

from nmfx.text import printable


class NmfxError(Exception):
    """Base of all errors raised by nmfx; the message names the site, the shape, what was expected and what to do.

    Its text is one line that can be shown on any terminal, whatever the names of files and models in it.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class PatternError(NmfxError, ValueError):
    """A text or a pair of numbers is not an N:M pattern."""


class SchemeError(NmfxError, ValueError):
    """A scheme does not fit a model, or a scheme file cannot be read."""


class TraceError(NmfxError):
    """A model cannot be run or traced to find its sites."""


class SearchError(NmfxError, ValueError):
    """A search cannot meet what it was asked for."""


class VerificationError(NmfxError):
    """A group holds more non-zeros than its pattern allows."""


class CheckpointError(NmfxError):
    """A checkpoint is truncated, altered, foreign, or does not fit the model."""


class ModelError(NmfxError, LookupError):
    """A model cannot be found, built, or given its weights."""


class DataError(NmfxError, ValueError):
    """Pictures cannot be found, read, or fitted to a model."""
