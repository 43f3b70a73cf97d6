"""nmfx: layer-wise N:M sparsity for any timm or torchvision network.

The names below are the public API; everything else may move. They are imported at first use, so that `nmfx --help` does
not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nmfx.data.source import open_data as open_data
    from nmfx.errors import NmfxError as NmfxError
    from nmfx.export.checkpoint import load_checkpoint as load_checkpoint
    from nmfx.export.checkpoint import save_checkpoint as save_checkpoint
    from nmfx.masking.sites import freeze as freeze
    from nmfx.masking.updates import pull as pull
    from nmfx.models.census import find_sites as find_sites
    from nmfx.models.site import Site as Site
    from nmfx.models.site import Sites as Sites
    from nmfx.models.tracer import to_graph as to_graph
    from nmfx.models.tracer import to_graphs as to_graphs
    from nmfx.passes.baking import bake as bake
    from nmfx.passes.correction import correct as correct
    from nmfx.passes.statistics import recalibrate_bn as recalibrate_bn
    from nmfx.passes.transform import scheme_of as scheme_of
    from nmfx.passes.transform import transform as transform
    from nmfx.passes.verification import verify as verify
    from nmfx.runtime.compiler import compile as compile
    from nmfx.runtime.saved.reading import load_compiled as load_compiled
    from nmfx.scheme import Scheme as Scheme
    from nmfx.search.domino_loop import DominoSearch as DominoSearch
    from nmfx.search.finder import find_scheme as find_scheme
    from nmfx.settings.training import Settings as Settings
    from nmfx.sparsity.pattern import Pattern as Pattern
    from nmfx.training.evaluation import evaluate as evaluate
    from nmfx.training.finetuning import finetune as finetune

__version__ = "0.1.0"

_HOMES = {
    "open_data": "nmfx.data.source",
    "NmfxError": "nmfx.errors",
    "load_checkpoint": "nmfx.export.checkpoint",
    "save_checkpoint": "nmfx.export.checkpoint",
    "find_sites": "nmfx.models.census",
    "freeze": "nmfx.masking.sites",
    "Site": "nmfx.models.site",
    "Sites": "nmfx.models.site",
    "to_graph": "nmfx.models.tracer",
    "to_graphs": "nmfx.models.tracer",
    "pull": "nmfx.masking.updates",
    "bake": "nmfx.passes.baking",
    "verify": "nmfx.passes.verification",
    "scheme_of": "nmfx.passes.transform",
    "transform": "nmfx.passes.transform",
    "compile": "nmfx.runtime.compiler",
    "load_compiled": "nmfx.runtime.saved.reading",
    "Scheme": "nmfx.scheme",
    "DominoSearch": "nmfx.search.domino_loop",
    "find_scheme": "nmfx.search.finder",
    "Pattern": "nmfx.sparsity.pattern",
    "correct": "nmfx.passes.correction",
    "recalibrate_bn": "nmfx.passes.statistics",
    "evaluate": "nmfx.training.evaluation",
    "finetune": "nmfx.training.finetuning",
    "Settings": "nmfx.settings.training",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nmfx' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
