"""A console that shows names as they are, and of what a terminal would act on only its escapes."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from nmfx.text import printable


class Terminal(Console):
    """rich's, but no byte of a name, a file or a message moves the cursor, colours, or breaks the output's encoding."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The segments of anything that is printed; those that are rich's own control codes stay."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=_shown(segment.text))


def _shown(words: str) -> str:
    return words if words.isprintable() else "\n".join(map(printable, words.split("\n")))
