"""The zoo as it was measured: one row a model, written by benchmarks/zoo.py and packaged as measured.csv."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields
from functools import cache
from pathlib import Path

from nmfx.errors import ModelError

PACKAGED = Path(__file__).with_name("measured.csv")
HEAD = re.compile(r"# measured (\d{4}-\d\d-\d\d) with (\S+ \S+(?:, \S+ \S+)*)")
NUMERICS = ("exact", "eval", "")


@dataclass(frozen=True)
class Entry:
    """What was measured of one model.

    Attributes:
        model: name with its library, as in ``timm:resnet50``.
        parameters: number of parameters, sites or not.
        sites: number of sites.
        weights: weights of all sites.
        macs: MACs of all sites, per sample.
        parts: fx graphs that cover the model: 1 when it traces at the root, 0 when no part of it does.
        reach: share of the weights read in eval mode that these graphs reach.
        numerics: converted against pre-masked on the CPU: ``exact``; ``eval``, exact, but it cannot train on its example
            input; or empty, not run.
    """

    model: str
    parameters: int
    sites: int
    weights: int
    macs: int
    parts: int
    reach: float
    numerics: str = ""

    @property
    def share(self) -> float:
        """Share of the parameters that are weights of sites."""
        return self.weights / max(1, self.parameters)


COLUMNS = tuple(field.name for field in fields(Entry))


@dataclass(frozen=True)
class Table:
    """Entries by model name, in the order of the libraries, with the day and the versions they were measured with."""

    date: str
    versions: Mapping[str, str]
    entries: Mapping[str, Entry]

    def to_csv(self) -> str:
        """The table as text: a comment with day and versions, a line of column names, one line a model."""
        stream = io.StringIO()
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        stream.write(f"# measured {self.date} with {versions}\n")
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(COLUMNS)
        for entry in self.entries.values():
            writer.writerow(f"{cell:.6g}" if isinstance(cell, float) else cell for cell in astuple(entry))
        return stream.getvalue()


@cache
def load_table() -> Table:
    """The table that came with this nmfx."""
    return parse_table(PACKAGED.read_text(encoding="utf-8"), PACKAGED.name)


def parse_table(content: str, origin: str = "table") -> Table:
    """Read what `Table.to_csv` wrote.

    Raises:
        ModelError: naming the first line that is not as it should be.
    """
    head, *lines = content.splitlines() or [""]
    if (match := HEAD.fullmatch(head)) is None:
        raise ModelError(f"{origin}: line 1: expected '# measured YYYY-MM-DD with NAME VERSION, ...', found {head[:60]!r}")
    if not lines or tuple(lines[0].split(",")) != COLUMNS:
        raise ModelError(f"{origin}: line 2: expected the columns {','.join(COLUMNS)}")
    entries: dict[str, Entry] = {}
    for number, line in enumerate(lines[1:], start=3):
        try:
            entry = _parse_row(next(csv.reader([line], strict=True), []))
        except (ValueError, csv.Error) as error:
            raise ModelError(f"{origin}: line {number}: {error}") from error
        if entry.model in entries:
            raise ModelError(f"{origin}: line {number}: {entry.model} appears twice")
        entries[entry.model] = entry
    versions = dict(pair.split(" ") for pair in match[2].split(", "))
    return Table(match[1], versions, entries)


def _parse_row(row: list[str]) -> Entry:
    if len(row) != len(COLUMNS):
        raise ValueError(f"expected {len(COLUMNS)} cells, found {len(row)}")
    model, parameters, sites, weights, macs, parts, reach, numerics = row
    entry = Entry(model, int(parameters), int(sites), int(weights), int(macs), int(parts), float(reach), numerics)
    if not re.fullmatch(r"[a-z]+:\S+", model):
        raise ValueError(f"{model!r} is not a model name such as 'timm:resnet50'")
    if not 0 <= entry.weights <= entry.parameters or min(entry.sites, entry.macs, entry.parts) < 0:
        raise ValueError(f"{model}: {entry.sites} sites of {entry.weights} weights in {entry.parameters} parameters cannot be")
    if not 0 <= entry.reach <= 1:
        raise ValueError(f"{model}: reach {reach} is not a share between 0 and 1")
    if numerics not in NUMERICS:
        raise ValueError(f"{model}: numerics {numerics!r}: expected 'exact', 'eval' or nothing")
    return entry
