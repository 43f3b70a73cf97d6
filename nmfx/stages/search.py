"""The search stage: a pattern for every site, by a method under a budget, one pattern for all, or the scheme of a file."""

from __future__ import annotations

import glob
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from nmfx.data.loader import train_loader
from nmfx.errors import SearchError
from nmfx.models.site import Sites
from nmfx.passes.transform import resolve_scheme
from nmfx.processes import world
from nmfx.progress import Progress, silent
from nmfx.scheme import Scheme, fit, shapes_of
from nmfx.search.domino_loop import DominoSearch
from nmfx.search.domino_run import run_domino
from nmfx.search.finder import SearchResult, conclude, find_scheme
from nmfx.search.problem import make_problem
from nmfx.search.tables import Tables
from nmfx.settings.choices import DEFAULT_M
from nmfx.settings.methods import METHODS
from nmfx.settings.option import values_of
from nmfx.settings.platforms import PLATFORMS
from nmfx.settings.search import DEFAULT_TARGET, SearchSettings
from nmfx.settings.stages import DataSettings
from nmfx.stages.data import fit_pictures, open_pictures, sample
from nmfx.stages.latency import Reached, search_latency
from nmfx.stages.work import WorkDirectory, example_of, pictures_of


@dataclass(frozen=True)
class SearchRecord:
    """What the search stage chose.

    Attributes:
        scheme: with the model and where its weights came from in its info.
        result: of the search, if there was one.
        reasons: why sites have another pattern than the one that all were to have.
        target: what was searched for where nothing was asked and 0.875 was out of reach, in words.
        reached: of a search under a budget of time, what was measured.
    """

    scheme: Scheme
    sites: Sites = field(repr=False)
    result: SearchResult | None = None
    reasons: dict[str, str] = field(default_factory=dict)
    target: str = ""
    reached: Reached | None = None


def search(
    work: WorkDirectory,
    settings: SearchSettings,
    data: DataSettings | None = None,
    *,
    device: str = "cpu",
    checkpoint: Path | None = None,
    progress: Progress = silent,
) -> SearchRecord:
    """Choose a pattern for every site of a work directory's model.

    Args:
        data: the pictures, for settings that look at them.
        checkpoint: what the published loop writes every few minutes, and goes on with.

    Returns:
        The scheme, and how it was found.

    Raises:
        SearchError: a target out of reach, or that cannot be had this way.
    """
    model = work.load()
    sites = work.sites(model)
    start = work.start(sites)
    record = choose(
        settings, model, sites, start=start, data=data, size=work.input_size, device=device, checkpoint=checkpoint,
        progress=progress,
    )  # fmt: skip
    return replace(record, scheme=with_origin(record.scheme, work.model, work.weights))


def with_origin(scheme: Scheme, model: str, weights: str) -> Scheme:
    """A scheme that says which model it is for, and where its weights came from."""
    return replace(scheme, info={**scheme.info, "model": model, "weights": weights})


def choose(
    settings: SearchSettings,
    model: nn.Module,
    sites: Sites,
    *,
    start: Scheme | None = None,
    data: DataSettings | None = None,
    size: tuple[int, ...] | None = None,
    device: str = "cpu",
    checkpoint: Path | None = None,
    progress: Progress = silent,
) -> SearchRecord:
    """The same for a model at hand.

    Args:
        start: the scheme that the weights are under already, which bounds a search.
        size: of the input without its batch, where it is not the model's own.

    Returns:
        The scheme, which does not say yet where the weights came from.

    Raises:
        SearchError: a target out of reach, or that cannot be had this way.
    """
    if settings.scheme:
        return SearchRecord(resolve_scheme(Path(settings.scheme), sites), sites)
    if settings.pattern is not None:
        return _uniform(settings, sites)
    question = values_of(settings.choices_there) | {"within": start}
    if question["m"] is None:  # one that starts from a sparse network keeps its M
        question["m"] = max((pattern.m for pattern in (start or {}).values()), default=DEFAULT_M)
    if question["vector"] is None and question["patterns"] is None:  # and the number of rows that share its masks
        question["vector"] = max((pattern.vector for pattern in (start or {}).values()), default=1)
    kept = gainless(settings, sites)
    question["keep_dense"] = (*question["keep_dense"], *map(glob.escape, kept))
    if settings.timed:
        if device != "cpu":
            raise SearchError(f"--device {device}: times are measured on the CPU; say --device cpu")
        one, find = pictures_of(example_of(model, size)), _finder(settings, model, sites, data, size, device)
        pictures = one.expand(settings.latency_batch, *one.shape[1:]).contiguous()
        target = settings.target_latency or ("2x" if settings.target is None else settings.target)
        reached = search_latency(model, sites, pictures, target, question, find, settings.precision, progress)
        return SearchRecord(reached.result.scheme, sites, _explained(reached.result, kept, settings.platform), reached=reached)
    question |= {"budget": settings.budget}
    target, said = DEFAULT_TARGET if settings.target is None else settings.target, ""
    if settings.target is None and not (settings.limits or start):
        target, said = default_target(sites, settings.method, question)
    question |= {"target": target, "limits": settings.limits}
    if settings.looping:
        assert data is not None
        result = _loop(settings, model, sites, data, size, device, checkpoint, progress, question)
    else:
        result = _finder(settings, model, sites, data, size, device)(**question)
    return SearchRecord(result.scheme, sites, _explained(result, kept, settings.platform), target=said)


def gainless(settings: SearchSettings, sites: Sites) -> dict[str, str]:
    """The sites that no pattern makes faster where the network is to run, and why; none where that is not said.

    Raises:
        SearchError: those are all.
    """
    if settings.platform is None:
        return {}
    there = PLATFORMS[settings.platform]
    found = {site.name: why for site in sites if (why := there.runs(site))}
    if len(found) == len(sites):
        raise SearchError(
            f"{there.label}: nothing of {sites.model} runs faster sparse there ({next(iter(found.values()), 'no sites')}); "
            f"search without a platform for a smaller checkpoint alone, or for nmfx, which is faster on CPUs"
        )
    return found


def _explained(result: SearchResult, kept: Mapping[str, str], platform: str | None) -> SearchResult:
    """With the reason why a site was left dense, instead of the glob that it was left out by."""
    reasons = {name: f"gains nothing on {platform}: {why}" for name, why in kept.items() if name in result.dense_reasons}
    return replace(result, dense_reasons={**result.dense_reasons, **reasons})


def _finder(
    settings: SearchSettings,
    model: nn.Module,
    sites: Sites,
    data: DataSettings | None,
    size: tuple[int, ...] | None,
    device: str,
) -> Callable[..., SearchResult]:
    """find_scheme with its method and the pictures it looks at."""
    batches = None
    if settings.data and data is not None:
        batch = min(settings.batch_size, max(1, settings.pictures // 8))
        how: dict[str, Any] = {"count": settings.pictures, "batch_size": batch, "seed": settings.seed, "workers": data.workers}
        batches = sample(open_pictures(data), model, size, **how)
    options = {name: getattr(settings, name) for name in METHODS[settings.method].options}
    return partial(
        find_scheme, model.to(device), sites=sites, method=settings.method, sensitivity=settings.measured,
        score=settings.score, data=batches, options=options,
    )  # fmt: skip


def default_target(sites: Sites, method: str, question: dict[str, Any]) -> tuple[str, str]:
    """0.875; where that is out of reach, what the densest pattern of each site comes to, and words that say so."""
    try:
        problem = make_problem(sites, target=0.0, mixed=METHODS[method].mixed, **question)
    except SearchError:
        return str(DEFAULT_TARGET), ""  # and the search says what is wrong
    dense, costs = problem.budget.dense, problem.costs
    kept = sum(row[-2] if len(row) > 1 else row[-1] for row in costs)
    if sum(map(min, costs)) <= dense * (1 - Fraction(str(DEFAULT_TARGET))) or kept == dense:
        return str(DEFAULT_TARGET), ""
    target = f"{math.floor(10**6 * (1 - Fraction(kept, dense))) / 10**6:.6f}"
    densest = (max(options[:-1], key=lambda p: (p.density, p.m, -p.vector)) for options in problem.options if options[1:])
    patterns = ", ".join(dict.fromkeys(map(str, densest)))
    return target, f"{target} of {problem.budget.kind}, {patterns} wherever it fits; {DEFAULT_TARGET} is out of reach"


def _uniform(settings: SearchSettings, sites: Sites) -> SearchRecord:
    """One pattern on every site that can take it."""
    pattern, choices = settings.pattern, settings.choices
    assert pattern is not None
    if pattern.is_dense:
        return SearchRecord(Scheme({}, shapes=shapes_of(sites)), sites)
    policy: dict[str, Any] = {"layout": choices.layout, "remainder": choices.remainder}
    scheme = Scheme.uniform(sites, pattern, keep_dense=choices.keep_dense, **policy)
    reasons = {s.name: r for s in sites if (r := fit(s, pattern, choices.layout, choices.remainder)[1])}
    return SearchRecord(replace(scheme, info={"m": str(pattern.m)}), sites, reasons=reasons)


def _loop(
    settings: SearchSettings,
    model: nn.Module,
    sites: Sites,
    data: DataSettings,
    size: tuple[int, ...] | None,
    device: str,
    checkpoint: Path | None,
    progress: Progress,
    question: dict[str, Any],
) -> SearchResult:
    """The published loop over training batches."""
    pictures, start = open_pictures(data), time.perf_counter()
    config, share = fit_pictures(pictures, model, size), settings.batch_size // world()
    loader = train_loader(pictures, config, batch_size=share, workers=data.workers, seed=settings.seed)

    def show(search: DominoSearch) -> None:
        aim = float(search.problem.budget.target) or 1.0
        last = ", ".join(f"{e.site} {e.after}" for e in search.events[-2:]) or "no site has tipped yet"
        progress(min(1.0, search.sparsity / aim), f"t = {search.t}, sparsity {search.sparsity:.4f}: {last}")

    search = run_domino(
        model, loader, sites=sites, checkpoint=checkpoint, progress=show, lr=settings.lr, seed=settings.seed,
        most=settings.most, device=device, **values_of(settings.loop), **question,
    )  # fmt: skip
    took = time.perf_counter() - start
    return conclude(Tables(search.problem, model), search.outcome, method=search.method, seconds=took)
