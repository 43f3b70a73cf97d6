"""How much of a model its fx graphs see."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from nmfx.errors import TraceError
from nmfx.models.census import find_sites
from nmfx.models.site import Sites
from nmfx.models.source import Source
from nmfx.models.table import Entry
from nmfx.models.tracer import to_graphs, trace


@dataclass(frozen=True)
class Coverage:
    """What the eval graphs of a model reach.

    Attributes:
        parts: number of graphs: 1 when the root traces, otherwise those of the largest parts that do.
        reach: share of the weights read in eval mode that the graphs reach.
        why: why the root does not trace; empty when it does.
    """

    parts: int
    reach: float
    why: str = ""


def find_coverage(model: nn.Module, sites: Sites) -> Coverage:
    """How many fx graphs cover `model`, converted or not, and how much of its sites they reach; the model is not touched."""
    try:
        reached, parts, why = _reads(model, trace(model).graph), 1, ""
    except TraceError as error:
        views = to_graphs(model)
        reached = set().union(*(_reads(view, view.graph) for view in views.values()))
        parts, why = len(views), str(error)
    parameters, read = dict(model.named_parameters()), [site for site in sites if not site.train_only]
    seen = sum(site.weights for site in read if id(parameters[site.name]) in reached)
    return Coverage(parts, seen / max(1, sum(site.weights for site in read)), why)


def _reads(model: nn.Module, graph: fx.Graph) -> set[int]:
    """Ids of the parameters that the graph's nodes reach."""
    reached: set[int] = set()
    for node in graph.nodes:
        if node.op == "call_module":
            reached |= {id(parameter) for parameter in model.get_submodule(str(node.target)).parameters()}
        elif node.op == "get_attr":
            path, _, attr = str(node.target).rpartition(".")
            reached.add(id(model.get_submodule(path)._parameters.get(attr)))
    return reached


def measure(source: Source) -> Entry:
    """The row of a model in the zoo's table, measured now, without its numerics: on the meta device, where nothing is stored.

    Raises:
        TraceError: the forward pass fails on the example input.
    """
    model = source.build_meta()
    sites = find_sites(model)
    covered, total = find_coverage(model, sites), sum(parameter.numel() for parameter in model.parameters())
    return Entry(str(source), total, len(sites), sites.weights, sites.macs, covered.parts, round(covered.reach, 6))
