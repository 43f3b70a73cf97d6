"""Run nmfx over every model of timm and torchvision: python benchmarks/zoo.py [--only GLOB] [--jobs 2] [--out zoo.jsonl]

One forked process a model, with limits on time and memory; one JSON line a model; models that have a line are not run again.
Structure is checked on the meta device for every model, numerics on the CPU for those of up to --numerics parameters.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import timm  # noqa: F401 - imported before the fork, so that a model costs no import
import torch
import torchvision  # noqa: F401
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import nmfx
from nmfx.graph.census import Census, Operand, _plain_attention, _storage
from nmfx.graph.masked import throw_away_copy
from nmfx.graph.tracer import to_graph, to_graphs, trace
from nmfx.passes.transform import conversion_difference
from nmfx.scheme import Scheme
from nmfx.zoo.example import Example, example_for
from nmfx.zoo.source import Source, find_source, list_models, versions

PATTERNS = ("2:4", "4:16")


class Reads(Census):
    """Notes every weight that an operation reads without its mask."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.unmasked: set[int] = set()

    def _record_weight(self, operand: Operand) -> None:
        if (key := _storage(operand.tensor)) in self.own:
            self.unmasked |= {id(p) for p in self.sources[key]}
        super()._record_weight(operand)


def check_reads(converted: nn.Module, example: Example, names: set[str]) -> list[str]:
    """Names of masked weights that the eval forward pass reads without their mask."""
    parameters = dict(converted.named_parameters())
    reads = Reads(list(parameters.values()), (example.args, example.kwargs))
    with next(iter(parameters.values())).device, torch.no_grad(), _plain_attention(), reads:
        converted.eval()(*example.args, **example.kwargs)
    return [name for name in names if id(parameters[name]) in reads.unmasked]


def structure(source: Source) -> dict[str, Any]:
    """Build on the meta device, find sites, convert, compare keys, follow the reads."""
    model = source.build_meta()
    example, start = example_for(model), time.perf_counter()
    sites = nmfx.find_sites(model, example)
    seconds = time.perf_counter() - start
    total = sum(p.numel() for p in model.parameters())
    record: dict[str, Any] = {
        "parameters": total,
        "sites": len(sites),
        "weights": sites.weights,
        "share": round(sites.weights / max(1, total), 6),
        "macs": sites.macs,
        "census_seconds": round(seconds, 3),
        "skipped": {s.name: [s.weights, s.reason] for s in sites.skipped},
        "missed": missed(model, sites),
        "notes": list(sites.notes),
        "kinds": sorted({site.kind for site in sites}),
    }
    keys = list(model.state_dict())
    model = throw_away_copy(model)  # on the meta device, where its constructor could not go
    for pattern in PATTERNS:
        converted = nmfx.transform(model, pattern, sites=sites)
        masked = set(nmfx.scheme_of(converted))
        assert list(converted.state_dict()) == keys, f"{pattern}: keys or their order changed"
        assert isinstance(converted, type(model)), "class changed"
        again = copy.deepcopy(converted)
        assert list(again.state_dict()) == keys
        assert set(nmfx.scheme_of(again)) == masked
        record[f"masked {pattern}"] = len(masked)
        if pattern == PATTERNS[0]:
            try:
                unread = check_reads(converted, example.to("meta", next(model.parameters()).dtype), masked)
            except Exception as error:
                record["reads"] = f"not followed on meta: {type(error).__name__}"
            else:
                assert not unread, f"read without their mask: {unread[:5]}"
                record["reads"] = "all masked"
    try:
        reached, parts, why = graph_reads(model, trace(model).graph), 1, ""
    except nmfx.NmfxError as error:
        views = to_graphs(converted)
        reached = set().union(*(graph_reads(view, view.graph) for view in views.values()))
        parts, why, model = len(views), str(error)[:200], converted
    parameters, read = dict(model.named_parameters()), [site for site in sites if not site.train_only]
    seen = sum(s.weights for s in read if id(parameters[s.name]) in reached)
    record["fx"] = {"parts": parts, "share": round(seen / max(1, sum(s.weights for s in read)), 6), "why": why}
    return record


MAKERS = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase)


def missed(model: nn.Module, sites: nmfx.Sites) -> dict[str, int]:
    """Weights that ought to be sites and are not: parameters of modules made for matmuls, and those that nothing reads.

    This asks for module types, which find_sites never does, so that one can be held against the other.
    """
    made = {name for name, module in model.named_modules() if isinstance(module, MAKERS)}
    left = [s for s in sites.skipped if s.name.rpartition(".")[0] in made or "never read" in s.reason or " only," in s.reason]
    return {s.name: s.weights for s in left}


def graph_reads(model: nn.Module, graph: torch.fx.Graph) -> set[int]:
    """Ids of the parameters that the graph's nodes reach."""
    reached: set[int] = set()
    for node in graph.nodes:
        if node.op == "call_module":
            reached |= {id(p) for p in model.get_submodule(node.target).parameters()}
        elif node.op == "get_attr":
            path, _, attr = node.target.rpartition(".")
            reached.add(id(model.get_submodule(path)._parameters.get(attr)))
    return reached


def outputs(model: nn.Module, example: Example, seed: int = 0) -> list[Tensor]:
    """All floating-point outputs; dropout draws the same numbers for the same seed."""
    torch.manual_seed(seed)
    leaves = tree_leaves(model(*example.args, **example.kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    """Bit for bit, NaN equal to NaN."""
    return len(a) == len(b) and all(x.shape == y.shape and torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(a, b))


def numerics(source: Source) -> dict[str, Any]:
    """Dense conversion, masked against pre-masked (outputs, gradients, buffers), modes, baking, checkpoint, fx: on the CPU."""
    torch.manual_seed(0)
    model = source.build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    fill = lambda t: torch.rand_like(t) if t.is_floating_point() else t  # noqa: E731
    example = example_for(model)
    example = Example(*tree_map_only(Tensor, fill, (example.args, example.kwargs)))
    sites = nmfx.find_sites(model, example)
    record: dict[str, Any] = {"dense_difference": conversion_difference(model, sites, example)}
    assert record["dense_difference"] == 0, f"dense conversion differs by {record['dense_difference']}"
    schemes = [Scheme.uniform(sites, pattern) for pattern in PATTERNS]
    both = {site.name: schemes[i % 2][site.name] for i, site in enumerate(sites) if site.name in schemes[i % 2]}
    converted = nmfx.transform(model, both, sites=sites, training="ste").eval()
    unread = check_reads(converted, example, set(both))
    assert not unread, f"read without their mask: {unread[:5]}"
    record["reads"] = "all masked"
    plain = nmfx.bake(converted)
    with torch.no_grad():
        expected = outputs(plain, example)
        assert equal(outputs(converted, example), expected), "masked differs from pre-masked in eval"
        converted.train(), converted.eval()
        assert equal(outputs(converted, example), expected), "differs after train() and eval()"
        with tempfile.TemporaryDirectory() as folder:
            nmfx.save_checkpoint(converted, Path(folder) / "c.safetensors")
            loaded = nmfx.load_checkpoint(Path(folder) / "c.safetensors")
        assert equal(outputs(loaded, example), expected), "checkpoint round trip differs"
        del loaded
    try:
        view = to_graph(converted)
    except nmfx.NmfxError:
        record["graph"] = "no root graph"
    else:
        with torch.no_grad():
            assert equal(outputs(view, example), expected), "fx graph differs in eval"
        record["graph"] = "exact"
    record["train"] = train_step(converted, plain, example)
    return record


def with_targets(model: nn.Module, example: Example) -> Example:
    """Torchvision's detectors want, beside the pictures, one object in each of them to learn from."""
    if not type(model).__module__.startswith("torchvision.models.detection"):
        return example
    target = {
        "boxes": torch.tensor([[20.0, 30.0, 200.0, 180.0]]),
        "labels": torch.ones(1, dtype=torch.int64),
        "masks": torch.ones(1, *example.args[0][0].shape[1:], dtype=torch.uint8),
        "keypoints": torch.full((1, 17, 3), 100.0),
    }
    return Example((example.args[0], [target] * len(example.args[0])))


def train_step(converted: nn.Module, plain: nn.Module, example: Example) -> str:
    """Outputs, gradients and buffers after one train-mode step, masked against pre-masked."""
    twice, results = with_targets(plain, example.doubled()), []
    for model in (converted.train(), plain.train()):
        try:
            out = outputs(model, twice)
            loss = sum(o.double().square().mean() for o in out if o.requires_grad)
            assert isinstance(loss, Tensor), "no output to train on"
            loss.backward()
        except Exception as error:
            results.append(f"cannot train on its example input: {type(error).__name__}")
            continue
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((out, grads, dict(nn.Module.state_dict(model))))
    first, second = results
    if isinstance(first, str) or isinstance(second, str):
        assert first == second, f"only one of the two trains: {first} {second}"
        return str(first)
    assert equal(first[0], second[0]), "train outputs differ"
    assert first[1].keys() == second[1].keys(), "other parameters have gradients"
    for name, grad in first[1].items():
        assert equal([grad], [second[1][name]]), f"gradient of {name} differs"
    masked = set(nmfx.scheme_of(converted))
    for name, value in first[2].items():
        assert name in masked or equal([value], [second[2][name]]) or value.dtype == torch.bool, f"buffer {name} differs"
    return "exact"


def run_one(name: str, numerics_limit: float, memory: float, path: str) -> None:
    """Check one model and leave its record in `path`."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (int(memory * 2**30),) * 2)
    record: dict[str, Any] = {"model": name}
    start = time.perf_counter()
    try:
        source = find_source(name)
        record |= structure(source)
        if record["parameters"] <= numerics_limit:
            record |= numerics(source)
        record["ok"] = True
    except Exception as error:
        record |= {"ok": False, "error": f"{type(error).__name__}: {error}"[:500], "trace": traceback.format_exc()[-1500:]}
    record["seconds"] = round(time.perf_counter() - start, 2)
    Path(path).write_text(json.dumps(record))


def write_table(records: list[dict[str, Any]], path: Path) -> None:
    """The records as docs/zoo.md: counts, what failed, and one row a model."""
    good = [record for record in records if record["ok"]]
    root = [record for record in good if isinstance(record["fx"], dict)]
    checked = [record for record in good if "train" in record]
    reads = [record for record in good if record.get("reads") == "all masked"]
    lines = [
        "# The zoo, measured",
        "",
        f"Written by `python benchmarks/zoo.py --table docs/zoo.md` on {time.strftime('%Y-%m-%d')}: "
        + ", ".join(f"{name} {version}" for name, version in versions().items()),
        "",
        f"- {len(good)} of {len(records)} models convert to 2:4 and 4:16 with their keys, order and class, and copy;",
        f"- {len(reads)} were followed through a forward pass of the converted model: every weight of the scheme "
        "is read masked (the others ask for values on the way, which the meta device has not);",
        f"- sites hold {sum(r['share'] for r in good) / max(1, len(good)):.2%} of a model's parameters on average;",
        f"- {len(root)} trace in torch.fx at the root;",
        f"- {len(checked)} were also compared on the CPU with pre-masked weights: outputs, gradients, buffers, baking, "
        "checkpoint.",
        "",
        *(f"- FAILED {record['model']}: {record['error']}" for record in records if not record["ok"]),
        "",
        "| model | parameters | sites | share | fx | skipped |",
        "|---|---|---|---|---|---|",
    ]
    for record in good:
        reasons = sorted({reason for _, reason in record["skipped"].values()})
        traced = f"{record['fx']['share']:.1%}" if isinstance(record["fx"], dict) else "parts"
        cells = (
            record["model"],
            f"{record['parameters']:,}",
            record["sites"],
            f"{record['share']:.2%}",
            traced,
            "; ".join(reasons),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Run what is missing, two at a time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="*")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", default="zoo.jsonl")
    parser.add_argument("--numerics", type=float, default=60e6, help="largest model, in parameters, to run on the CPU")
    parser.add_argument("--seconds", type=float, default=400)
    parser.add_argument("--memory", type=float, default=40, help="GiB of address space a process")
    parser.add_argument("--table", type=Path, help="only write the records as a Markdown table to this file")
    args = parser.parse_args()
    out = Path(args.out)
    if args.table:
        write_table([json.loads(line) for line in out.read_text().splitlines()], args.table)
        return
    done = {json.loads(line)["model"] for line in out.read_text().splitlines()} if out.exists() else set()
    names = [n for n in list_models() if fnmatch.fnmatch(n, args.only) and n not in done]
    context, running, total = multiprocessing.get_context("fork"), [], len(names)
    folder = tempfile.mkdtemp()
    while names or running:
        while names and len(running) < args.jobs:
            name = names.pop(0)
            path = os.path.join(folder, name.replace("/", "_"))
            process = context.Process(target=run_one, args=(name, args.numerics, args.memory, path))
            process.start()
            running.append((process, name, path, time.monotonic()))
        time.sleep(0.02)
        for entry in list(running):
            process, name, path, start = entry
            late = time.monotonic() - start > args.seconds
            if process.is_alive() and not late:
                continue
            if late:
                process.kill()
            process.join()
            running.remove(entry)
            why = f"no answer in {args.seconds:g} s" if late else f"process ended with {process.exitcode}"
            line = Path(path).read_text() if Path(path).exists() else json.dumps({"model": name, "ok": False, "error": why})
            with out.open("a") as file:
                file.write(line + "\n")
            record = json.loads(line)
            left = f"{total - len(names) - len(running)}/{total}"
            print(
                left, name, "ok" if record["ok"] else f"FAILED {record['error'][:150]}", record.get("seconds"), file=sys.stderr
            )


if __name__ == "__main__":
    main()
