"""A program that uses every public name as its reader would; mypy --strict reads it (test_typing.py)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import nmfx


def compress(dense: nn.Module, x: Tensor, batches: list[tuple[Tensor, Tensor]], folder: Path) -> nn.Module:
    sites: nmfx.Sites = nmfx.find_sites(dense, x)
    first: nmfx.Site = next(iter(sites))
    shape: tuple[int, ...] = first.shape
    found = nmfx.find_scheme(dense, target=0.75, sites=sites, keep_dense=["head"])
    scheme: nmfx.Scheme = found.scheme
    sparsity: float = found.totals.sparsity
    pattern: nmfx.Pattern = scheme.patterns[first.name]
    print(shape, sparsity, pattern.n, pattern.density)

    model: nn.Module = nmfx.transform(dense, scheme, sites=sites, training="sr-ste")
    for corrected in nmfx.correct(model, batches):
        print(corrected)
    seen: int = nmfx.recalibrate_bn(model, batches, dense=dense)
    settings = nmfx.Settings(epochs=1, lr=0.01)
    data = nmfx.open_data("digits")
    trained = nmfx.finetune(model, data, settings=settings)
    top1: float = nmfx.evaluate(model, batches).top1
    print(seen, trained, top1, nmfx.verify(model).nonzeros)
    nmfx.pull(model)
    nmfx.freeze(model)
    if nmfx.scheme_of(model) != scheme:
        raise nmfx.NmfxError("another scheme")

    search = nmfx.DominoSearch(dense, 0.875, example_input=x)
    while not search.done:
        search.step()
    graph: torch.fx.GraphModule = nmfx.to_graph(nmfx.bake(model), x)
    print(graph.code, nmfx.to_graphs(model), search.scheme)

    nmfx.save_checkpoint(model, folder / "model.safetensors")
    nmfx.compile(model, x).save(folder / "model.nmfxc")
    fast = nmfx.load_compiled(folder / "model.nmfxc")
    print(fast(x))
    return nmfx.load_checkpoint(folder / "model.safetensors", dense)
