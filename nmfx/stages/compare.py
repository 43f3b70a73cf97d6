"""Schemes for one network: which network it is, each scheme checked against it, and what each loses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from nmfx.errors import ModelError, NmfxError, SchemeError
from nmfx.export.checkpoint import read_checkpoint
from nmfx.files.parsing import read_text
from nmfx.models.building import build_meta
from nmfx.models.census import find_sites
from nmfx.models.site import Sites, weight_of
from nmfx.models.source import Source, find_source
from nmfx.passes.thresholds import shared_squares
from nmfx.report.record import Report
from nmfx.scheme import Scheme
from nmfx.settings.stages import ModelSettings
from nmfx.stages.work import WorkDirectory, around, example_of, open_work


@dataclass(frozen=True)
class Network:
    """What the schemes are for: its sites, and its weights where they are at hand and not random.

    The sites have the network's name instead of its class: resnet18 and resnet34 are both a ResNet.
    """

    sites: Sites
    model: nn.Module | None = None
    guessed: bool = False  # from a name alone, which does not say what it was built with


def compare(paths: Sequence[Path], settings: ModelSettings) -> list[Report]:
    """Schemes of files or work directories on the network that they are for, and what each loses where it has weights.

    Raises:
        NmfxError: nobody says which network it is, or a scheme does not fit it.
    """
    network = find_network(paths, settings)
    schemes, names = [read_scheme(path, network) for path in paths], [path.name for path in paths]
    reports = []
    for path, scheme in zip(paths, schemes, strict=True):
        label, method = path.name if names.count(path.name) == 1 else str(path), str(scheme.info.get("method", ""))
        lost = weight_error(network, scheme) if network.model else None
        facts = {} if lost is None else {"squared weight error": f"{lost:.4%}"}
        reports.append(Report(network.sites, scheme, label, network.sites.model, method, facts=facts, lost=lost))
    return reports


def find_network(paths: Sequence[Path], settings: ModelSettings) -> Network:
    """The network that settings name (a model, or a work directory), that of the first work directory that is or holds one of
    `paths`, or the one that the first scheme names.

    Raises:
        NmfxError: nobody says which it is.
    """
    size, kwargs = settings.size, settings.kwargs
    if settings.name:
        directory = Path(settings.name)
        return _of_work(open_work(directory)) if directory.is_dir() else _of_name(settings.name, kwargs, size)
    for path in [] if kwargs or size else [*filter(Path.is_dir, paths), *filter(Path.is_file, paths)]:
        if (found := open_work(path) if path.is_dir() else around(path)) is not None:
            return _of_work(found)
    for path in paths:
        if (source := _source(path)) is not None:
            return _of_name(str(source), {**source.kwargs, **kwargs}, size)
    raise NmfxError(f"{paths[0]}: does not say which network it is for; give --model NAME, or a work directory")


def _of_work(found: WorkDirectory) -> Network:
    model = None if found.random else found.load()
    sites = found.sites(found.build_meta() if model is None else model)
    return Network(replace(sites, model=found.model), model)


def _of_name(name: str, kwargs: Mapping[str, Any], size: tuple[int, ...] | None) -> Network:
    source = replace(find_source(name), kwargs=dict(kwargs))
    model = build_meta(source)
    return Network(replace(find_sites(model, example_of(model, size)), model=str(source)), guessed=True)


def _source(path: Path) -> Source | None:
    """What a checkpoint or a scheme says of its network; None when it says nothing that we could build."""
    if path.suffix == ".safetensors":
        return read_checkpoint(path)[0].source
    if read_text(path, "a scheme", SchemeError).lstrip().startswith("{"):
        return None  # the published format
    try:
        return find_source(str(Scheme.load(path).info["model"]))
    except (ModelError, KeyError):
        return None


def read_scheme(path: Path, network: Network) -> Scheme:
    """The scheme of a file or work directory, checked against the network.

    Raises:
        NmfxError: naming the file and the first difference.
    """
    sites = network.sites
    try:
        if path.is_dir():
            found = open_work(path)
            if not found.scheme_path.is_file():
                raise NmfxError(f"{path}: has no scheme yet; make one with `nmfx search {path}`")
            return Scheme.load(found.scheme_path, sites)
        scheme = read_checkpoint(path)[0].scheme if path.suffix == ".safetensors" else Scheme.load(path, sites)
        scheme.check(sites)
    except SchemeError as error:
        said = str(error) if str(error).startswith(str(path)) else f"{path}: {error}"
        if network.guessed:
            said = said.removesuffix("; make it anew")
            said += "; made for other classes or another input? say --classes N, --input-size CxHxW, or --model DIR"
        raise SchemeError(said) from error
    return scheme


def weight_error(network: Network, scheme: Scheme) -> float:
    """Share of all squared weights that `scheme` drops."""
    assert network.model is not None
    lost = energy = 0.0
    for site in network.sites:
        weight = weight_of(network.model, site)
        energy += float(weight.detach().double().square().sum())
        if site.name in scheme:
            lost += float(shared_squares(weight, scheme.grouping(site))[scheme[site.name].n :].sum())
    return lost / (energy or 1.0)
