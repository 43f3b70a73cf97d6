"""How patterns are chosen: the method and its budget, and the numbers of the published loop."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from nmfx import text
from nmfx.errors import NmfxError, SearchError
from nmfx.settings.choices import Choices
from nmfx.settings.methods import METHODS, SENSITIVITIES, default_sensitivity
from nmfx.settings.option import check_options, inline, option
from nmfx.settings.platforms import PLATFORMS
from nmfx.settings.target import BudgetKind, parse_limit, parse_target
from nmfx.sparsity.pattern import Pattern
from nmfx.sparsity.score import SCORES, check_score

if TYPE_CHECKING:
    Where = str
else:  # the words that the flag may say
    Where = Literal[tuple(PLATFORMS)]
QUANTILE = 0.75  # share of a site's groups that must agree before it steps (domino.md, section 4)
DEFAULT_TARGET = 0.875  # the sparsity where it can be reached
DOUBLINGS = (30_000, 40_000, 50_000, 60_000, 70_000, 80_000)
ALONE = {"scheme": (), "pattern": ("keep_dense", "layout", "remainder")}  # keys that a search by neither can have beside them
LEADING = {  # keys that say what others say
    "limits": ("target", "budget"),
    "patterns": ("m", "candidates", "vector"),
    "target_latency": ("target", "budget", "limits"),
}


@dataclass(frozen=True)
class DominoSettings:
    """The numbers of the published loop (domino.md, section 4); see `DominoSearch`."""

    eta: bool = option(True, "layer-wise penalty factors; the ablation is without them", flag="no-eta")
    b1: float | None = option(None, "share of MACs in eta; 0.5, or 0.8 for a budget of MACs", flag=None)
    b2: float | None = option(None, "share of ERK in eta; 0.5, or 0.2 for a budget of MACs", flag=None)
    decay: float = option(0.1, "domino: penalty on kept weights", least=0)
    penalty_every: int = option(5, "iterations between penalties", flag=None, least=1)
    vote_every: int = option(100, "domino: iterations between votes", least=1, metavar="T")
    quorum: float = option(QUANTILE, "share of a site's groups that must agree before it steps", flag=None, least=0, most=1)
    tolerance: float = option(0.001, "the search is done this near to the target", flag=None, least=0, most=1)
    doublings: tuple[int, ...] = option(DOUBLINGS, "iterations at which decay doubles", flag=None)

    def __post_init__(self) -> None:
        if not isinstance(self.eta, bool):
            raise SearchError(f"eta={self.eta!r}: expected True or False")
        check_options(self, "DominoSearch", SearchError)
        object.__setattr__(self, "doublings", tuple(self.doublings))

    def decay_at(self, t: int) -> float:
        """The decay of iteration t: doubled at each of the `doublings`."""
        return self.decay * 2.0 ** sum(t >= doubling for doubling in self.doublings)


@dataclass(frozen=True)
class SearchSettings:
    """Which patterns: by a `method` under a budget, or `pattern` on every site that can take it, or the `scheme` of a file."""

    method: str = option("knapsack", ", ".join(dict.fromkeys(("knapsack", *METHODS))))
    target: float | str | None = option(None, "sparsity to reach, as 0.875, or times fewer, as 8x; 0.875, or what is in reach")
    budget: BudgetKind = option("params", "what the target counts; bytes: of the packed weights; latency: see --target-latency")
    platform: Where | None = option(
        None,
        "where the network is to run: sites are offered what runs faster there, and the others stay dense (docs/platforms.md)",
        flag="for",
    )
    limits: Mapping[str, float | str] | None = option(
        None,
        "instead of target and budget, one or two of: params, macs or bytes, and the share to keep or times fewer, as in "
        "params=0.125 or macs=4x",
        flag="limit",
        metavar="KIND=SHARE",
        repeat=True,
    )
    pattern: Pattern | None = option(None, "this pattern on every site that can take it", flag=None)
    scheme: str = option("", "a scheme file", flag=None)
    data: bool = option(False, "look at training pictures: domino runs the published loop, others measure on a few", flag=None)
    sensitivity: str = option(
        "", "what the knapsack sums up: weight, activation, corrected, gradient or measured; gradient with data, weight without"
    )
    score: str = option("magnitude", f"what masks rank weights by: {', '.join(SCORES)}")
    target_latency: str | None = option(
        None,
        "times faster than the best dense run on this CPU, by nmfx.compile; every pattern of every site is timed first",
        metavar="2x",
    )
    precision: Literal["float32", "int8"] = option(
        "float32", "with --target-latency: what nmfx.compile computes in; int8 is timed beside the best dense int8 engine here"
    )
    latency_batch: int = option(1, "batch size to be fast for", least=1, most=4096, metavar="B")
    pictures: int = option(256, "training pictures to look at", least=1)
    seconds: float = option(60.0, "time limit of spdy", least=0, above=True)
    lr: float = option(0.01, "domino: learning rate", least=0)
    batch_size: int = option(64, "pictures a batch, of all processes together", least=1)
    most: int = option(100_000, "domino: iterations to give up after", least=1, metavar="T")
    seed: int = option(0, "of the pictures, and of spdy", least=0, most=2**32 - 1)
    choices: Choices = inline(Choices())
    loop: DominoSettings = inline(DominoSettings())

    def check_given(self, given: Collection[str]) -> None:
        """Refuse keys that were given beside others, and would say nothing there."""
        for lonely, allowed in ALONE.items():
            if lonely in given and (extra := next((key for key in given if key not in (lonely, *allowed)), None)):
                takes = ", ".join(allowed) or "no other"
                raise SearchError(f"`{extra}` says nothing beside `{lonely}`; {lonely} takes {takes}")
        for leading, others in LEADING.items():
            if leading in given and any(key in given for key in others):
                what = "all patterns" if leading == "patterns" else "the budget"
                *first, last = (f"`{key}`" for key in others)
                raise SearchError(f"`{leading}` says {what}; leave {', '.join(first)} and {last} out")
        self._check_platform(given)
        loop = (*DominoSettings.__dataclass_fields__, "lr", "most")
        if not self.looping and (extra := next((key for key in loop if key in given), None)):
            raise SearchError(f"`{extra}` is of the published loop: it needs `method` domino with `data`")

    def __post_init__(self) -> None:
        first = dict.fromkeys((type(self).method, *METHODS))  # the default one first
        for key, word, known in (("method", self.method, first), ("sensitivity", self.sensitivity, ("", *SENSITIVITIES))):
            if word not in known:
                raise NmfxError(f"unknown {key} {word!r}{text.nearest(word, known)}; known: {', '.join(filter(None, known))}")
        needs, scored = METHODS[self.method], check_score(self.score).needs
        check_options(self, "search settings")
        if self.platform is not None and self.platform not in PLATFORMS:
            near = text.nearest(self.platform, PLATFORMS)
            raise NmfxError(f"unknown platform {self.platform!r}{near}; known: {', '.join(PLATFORMS)}")
        if self.target is not None:
            parse_target(self.target)
        for share in (self.limits or {}).values():
            parse_limit(share)
        if self.sensitivity and not needs.sums:
            raise SearchError(f"`sensitivity` is the knapsack's; method {self.method} has none: add `method` knapsack")
        if self.looping and self.score != "magnitude":
            raise SearchError(f"score {self.score}: the published loop ranks weights by magnitude; leave one of them out")
        looks = {
            f"method {self.method}": needs.pictures == "always",
            f"sensitivity {self.measured}": SENSITIVITIES[self.measured].pictures,
            f"score {self.score}": scored != "nothing",
        }
        if not self.data and (which := next((name for name, does in looks.items() if does), "")):
            raise SearchError(f"{which} looks at pictures: give `data`")
        if self.data and needs.pictures == "never" and not any(looks.values()):
            raise SearchError(f"method {self.method} looks at no pictures; leave `data` out")
        if self.data and needs.sums and not any(looks.values()):
            raise SearchError("`sensitivity` weight looks at no pictures: take activation, corrected, gradient or measured")
        self.choices.check_shared(mixed=needs.mixed)
        if self.precision == "int8" and not self.timed:
            raise SearchError("`precision` int8 counts for times only: give `target_latency`")
        if self.timed and not needs.timed:
            raise SearchError(
                f"times are the knapsack's and spdy's to budget; method {self.method} counts parameters, MACs or bytes"
            )

    def _check_platform(self, given: Collection[str]) -> None:
        """Refuse what contradicts the platform: patterns that gain nothing there, groups it does not know, times of another."""
        if self.platform is None:
            return
        there, said = PLATFORMS[self.platform], f"`platform` {self.platform}"
        if asked := [f"`{key}`" for key in ("patterns", "m", "candidates", "vector") if key in given]:
            for pattern in (pattern for patterns in self.choices_there.wanted.values() for pattern in patterns):
                if why := there.takes(pattern):
                    raise SearchError(f"{said}: {why}; leave {' and '.join(asked)} out, or ask for what runs faster there")
        for key in ("layout", "remainder") if there.whole else ():
            if getattr(self.choices, key) != (usual := getattr(Choices, key)):
                raise SearchError(f"{said} wants whole groups within one row of input channels: leave `{key}` at {usual}")
        if self.timed and not there.measured:
            raise SearchError(f"{said}: times are those of nmfx's own runtime; give `platform` nmfx, or a `target` to count")

    @property
    def choices_there(self) -> Choices:
        """What a site may be given, with the patterns of the platform where none are asked for."""
        own, there = self.choices, PLATFORMS[self.platform] if self.platform is not None else None
        if there is None or not there.patterns or (own.m, own.candidates, own.patterns) != (None, None, None):
            return own
        patterns = tuple(Pattern(p.n, p.m, v) for p in map(Pattern, there.patterns) for v in own.shared)
        return replace(own, patterns=patterns)

    @property
    def measured(self) -> str:
        """The sensitivity that is summed up: what is asked for, or the best that the data at hand allow."""
        return self.sensitivity or default_sensitivity(self.method, self.data)

    @property
    def timed(self) -> bool:
        """Whether the budget is measured time."""
        return self.target_latency is not None or self.budget == "latency"

    @property
    def looping(self) -> bool:
        """Whether it is the published loop over training batches."""
        return self.data and METHODS[self.method].looped
