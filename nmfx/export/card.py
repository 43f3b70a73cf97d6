"""A model card: what a network is, what was measured of it, how it was made and how it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from nmfx import __version__
from nmfx.models.site import Sites
from nmfx.models.source import Source, versions
from nmfx.scheme import Scheme
from nmfx.text import size

HERE = "here"  # what the network of a card is called in its tables


@dataclass(frozen=True)
class Figure:
    """One measured accuracy: of what, shares of right answers in 0..1, on how many pictures of which data."""

    what: str
    top1: float
    top5: float
    samples: int
    data: str


def write_card(
    source: Source,
    scheme: Scheme,
    sites: Sites,
    figures: Sequence[Figure],
    *,
    weights: str,
    bytes_of: Mapping[str, int],
    config: Mapping[str, Any],
) -> str:
    """The text of README.md.

    Args:
        figures: as recorded; none are made up where there are none.
        weights: where the weights come from.
        bytes_of: sizes of files, by what they are.
        config: timm's of the pretrained network; of it the licence and the name of the base model are said.
    """
    totals, sparse = scheme.totals(sites), f"{scheme.totals(sites).sparsity:.1%}"
    pretrained = weights.startswith("pretrained") or "pretrained" in weights
    head: dict[str, Any] = {"tags": ["nmfx", "n-m-sparsity", "pruning", *(["timm"] if source.library == "timm" else [])]}
    head |= {"library_name": "timm"} if source.library == "timm" else {}
    if pretrained and config.get("hf_hub_id"):
        head["base_model"] = str(config["hf_hub_id"])
    if pretrained and config.get("license"):
        head["license"] = str(config["license"])
    lines = ["---", yaml.safe_dump(head, sort_keys=False).rstrip(), "---", ""]
    lines += [f"# {source.name}, {sparse} of its weights zero", ""]
    lines += [
        f"`{source}` under a layer-wise N:M scheme: of each M weights along the input channels of a layer, N are kept "
        f"({scheme.counts(sites)}). Made by nmfx {__version__}.",
        "",
        "| | dense | here |",
        "|---|---|---|",
        f"| weights of {len(sites)} layers | {totals.weights:,} | {totals.kept:,} ({totals.sparsity:.2%} zeros) |",
        f"| multiply-adds a sample | {totals.macs:,} | {totals.kept_macs:,} ({totals.mac_sparsity:.2%} fewer) |",
        *(f"| {what} | | {size(number)} |" for what, number in bytes_of.items()),
        "",
        "## Measured",
        "",
        *_measured(figures),
        "",
        "## Loading it",
        "",
        *_loading(source),
        "",
        "## How it was made",
        "",
        f"- weights: {weights}",
        *(
            f"- {key}: {value}"
            for key, value in scheme.info.items()
            if key in ("method", "score", "budget", "target") and value
        ),
        *([f"- pictures of {'x'.join(map(str, config['input_size']))}"] if config.get("input_size") else []),
        f"- {', '.join(f'{name} {version}' for name, version in versions().items())}",
        "",
        "`scheme.yaml` has the pattern of every layer.",
    ]
    return "\n".join(lines) + "\n"


def _measured(figures: Sequence[Figure]) -> list[str]:
    """A table of them, and a line where none is of the weights that lie here."""
    lines = ["| | top-1 | top-5 | on |", "|---|---|---|---|"] if figures else []
    for one in figures:
        lines.append(f"| {one.what} | {one.top1:.2%} | {one.top5:.2%} | {one.samples:,} validation pictures of {one.data} |")
    if not any(one.what == HERE for one in figures):
        how = "`nmfx evaluate DIR --data PICTURES` records it; export again after it"
        lines += [*([""] if lines else []), f"No accuracy of these weights was recorded. {how}."]
    return lines


def _loading(source: Source) -> list[str]:
    lines = ["```python"]
    if source.library == "timm":
        lines += [
            "import timm",
            "",
            'model = timm.create_model("local-dir:FOLDER", pretrained=True)  # real zeros, plain layers',
            "",
        ]
    lines += ["import nmfx", "", 'model = nmfx.load_checkpoint("FOLDER")  # masked, to train on or to compile', "```"]
    return lines
