"""Run nmfx over every model of timm and torchvision: python benchmarks/zoo.py [--only GLOB,...] [--jobs 2] [--out zoo.jsonl]

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
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

import timm  # noqa: F401 - imported before the fork, so that a model costs no import
import torch
import torchvision  # noqa: F401
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import nmfx
from nmfx.masking.copies import throw_away_copy
from nmfx.masking.sites import masked_sites
from nmfx.masking.weight import mask_name
from nmfx.models.coverage import find_coverage
from nmfx.models.example import Example, example_for
from nmfx.models.following import Census, plain_kernels
from nmfx.models.source import Source, find_source, list_models, versions
from nmfx.models.table import Entry, Table
from nmfx.models.tracer import to_graph
from nmfx.passes.receiving import received
from nmfx.passes.transform import conversion_difference
from nmfx.scheme import Scheme
from nmfx.sparsity.mask import check_groups

PATTERNS = ("2:4", "4:16")


def check_reads(converted: nn.Module, example: Example, names: set[str]) -> list[str]:
    """Names of masked weights that a product of the eval forward pass reads without their mask."""
    parameters = dict(converted.named_parameters())
    reads = Census(list(parameters.values()), (example.args, example.kwargs))
    with next(iter(parameters.values())).device, torch.no_grad(), plain_kernels(), reads:
        converted.eval()(*example.args, **example.kwargs)
    return [name for name in names if id(parameters[name]) in reads.plain]


def structure(source: Source) -> tuple[dict[str, Any], nmfx.Sites]:
    """Build on the meta device, find sites, convert, compare keys, follow the reads: a record, and the sites."""
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
    covered = find_coverage(converted, sites)
    record["fx"] = {"parts": covered.parts, "share": round(covered.reach, 6), "why": covered.why[:200]}
    return record, sites


MAKERS = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase)


def missed(model: nn.Module, sites: nmfx.Sites) -> dict[str, int]:
    """Weights that ought to be sites and are not: parameters of modules made for matmuls, and those that nothing reads.

    This asks for module types, which find_sites never does, so that one can be held against the other.
    """
    made = {name for name, module in model.named_modules() if isinstance(module, MAKERS)}
    left = [s for s in sites.skipped if s.name.rpartition(".")[0] in made or "never read" in s.reason or " only," in s.reason]
    return {s.name: s.weights for s in left if "scale" not in s.reason}  # NFNets' gains stand beside the weights


def outputs(model: nn.Module, example: Example, seed: int = 0) -> list[Tensor]:
    """All floating-point outputs; dropout draws the same numbers for the same seed."""
    torch.manual_seed(seed)
    leaves = tree_leaves(model(*example.args, **example.kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    """Bit for bit, NaN equal to NaN."""
    return len(a) == len(b) and all(x.shape == y.shape and torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(a, b))


def smaller(model: nn.Module, example: Example, side: int = 96) -> Example:
    """The same weights meet fewer pixels, where the model takes pictures of another size."""
    (x, *more) = example.args or (None,)
    if more or not isinstance(x, Tensor) or x.dim() != 4 or min(x.shape[2:]) <= side:
        return example
    less = Example((torch.rand_like(x[..., :side, :side]),))
    try:
        outputs(model, less)
        outputs(copy.deepcopy(model).train(), less.doubled())  # Inception's second head wants larger pictures
    except Exception:
        return smaller(model, example, 128) if side < 128 else example
    return less


def check_received(converted: nn.Module, example: Example, sites: nmfx.Sites) -> dict[str, Any]:
    """Every site that an eval forward pass reads arrives at its product with the zeros of its pattern.

    Returns:
        How many sites arrived, how many did not (auxiliary heads, branches not taken), and the least share of zeros by pattern.
    """
    arrived, least, unmet = received(converted, example), {}, []
    for masked in masked_sites(converted):
        name, pattern = masked.spec.name, str(masked.spec.pattern)
        if (nonzero := arrived.get(id(masked.parameter))) is None:
            unmet.append(name)
            continue
        check_groups(name, nonzero, masked.spec.pattern.n, masked.spec.grouping)
        least[pattern] = min(least.get(pattern, 1.0), 1 - float(nonzero.float().mean()))
    lost = [name for name in unmet if not sites[name].train_only]
    zeros = {pattern: round(share, 6) for pattern, share in sorted(least.items())}
    return {"arrived": len(list(masked_sites(converted))) - len(unmet), "unmet": lost, "zeros": zeros}


def numerics(source: Source, sites: nmfx.Sites | None = None, *, followed: bool = False) -> dict[str, Any]:
    """Dense conversion, masked against pre-masked (outputs, gradients, buffers), modes, baking, checkpoint, fx: on the CPU, at
    96x96 where that will do.
    """
    torch.manual_seed(0)
    model = source.build()
    noise = torch.randn(1 << 20) * 0.02
    with torch.no_grad():
        for parameter in model.parameters():  # no zeros to begin with
            parameter.add_(noise.repeat(-(-parameter.numel() // len(noise)))[: parameter.numel()].view(parameter.shape))
    fill = lambda t: torch.rand_like(t) if t.is_floating_point() else t  # noqa: E731
    example = smaller(model, example_for(model))
    example = Example(*tree_map_only(Tensor, fill, (example.args, example.kwargs)))
    sites = sites or nmfx.find_sites(model, example)
    record: dict[str, Any] = {"dense_difference": conversion_difference(model, sites, example)}
    assert record["dense_difference"] == 0, f"dense conversion differs by {record['dense_difference']}"
    schemes = [Scheme.uniform(sites, pattern) for pattern in PATTERNS]
    both = {site.name: schemes[i % 2][site.name] for i, site in enumerate(sites) if site.name in schemes[i % 2]}
    converted = nmfx.transform(model, both, sites=sites, training="ste").eval()
    if not followed:  # the meta device could not say
        unread = check_reads(converted, example, set(both))
        assert not unread, f"read without their mask: {unread[:5]}"
        record["reads"] = "all masked"
    record |= check_received(converted, example, sites)
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
    # Baked, a standardised weight is a plain one: its gradient, and its gain, are others; all that lies behind it agrees.
    derived = tuple(f"{masked.path}." for masked in masked_sites(converted) if masked.spec.derived)
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
        grads = {name: grad for name, grad in grads.items() if not name.startswith(derived)}
        masks = {f"{m.path}.{mask_name(m.attr)}".lstrip(".") for m in masked_sites(model)}
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers() if name not in masks}
        results.append((out, grads, buffers))
    first, second = results
    if isinstance(first, str) or isinstance(second, str):
        assert first == second, f"only one of the two trains: {first} {second}"
        return str(first)
    assert equal(first[0], second[0]), "train outputs differ"
    assert first[1].keys() == second[1].keys(), "other parameters have gradients"
    for name, grad in first[1].items():
        assert equal([grad], [second[1][name]]), f"gradient of {name} differs"
    for name, value in first[2].items():
        assert equal([value], [second[2][name]]), f"buffer {name} differs"
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
        found, sites = structure(source)
        record |= found
        if record["parameters"] <= numerics_limit:
            record |= numerics(source, sites, followed=record["reads"] == "all masked")
        record["ok"] = True
    except Exception as error:
        record |= {"ok": False, "error": f"{type(error).__name__}: {error}"[:500], "trace": traceback.format_exc()[-1500:]}
    record["seconds"], record["cpu_seconds"] = round(time.perf_counter() - start, 2), round(time.process_time(), 2)
    Path(path).write_text(json.dumps(record))


def write_table(records: list[dict[str, Any]], date: str, limit: float, markdown: Path, table: Path) -> None:
    """The records as docs/zoo.md (counts, what failed, what is skipped) and as the CSV file of `nmfx.models.table`."""
    place = {name: index for index, name in enumerate(list_models())}
    records = sorted({record["model"]: record for record in records}.values(), key=lambda r: place[r["model"]])
    good = [record for record in records if record["ok"]]
    with_versions = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines = [
        "# The zoo, measured",
        "",
        f"Measured on {date} with {with_versions} by `python benchmarks/zoo.py`; written by `python benchmarks/zoo.py "
        f"--table docs/zoo.md --csv nmfx/models/measured.csv`. One row a model: `nmfx models`, or nmfx/models/measured.csv.",
        "",
        *structure_summary(records, good),
        *graph_summary(good),
        *numerics_summary(good, limit),
        "",
        *(f"- FAILED {record['model']}: {one_line(record['error'])}" for record in records if not record["ok"]),
        "",
        *skipped_summary(good),
    ]
    markdown.write_text("\n".join(lines) + "\n")
    table.write_text(Table(date, versions(), {record["model"]: entry(record) for record in good}).to_csv())


def structure_summary(records: list[dict[str, Any]], good: list[dict[str, Any]]) -> list[str]:
    """What converts, what was followed, and how much of a model its sites are."""
    failed = Counter(one_line(record["error"]).partition(":")[0] for record in records if not record["ok"])
    why = f" ({', '.join(f'{error} x {n}' for error, n in failed.most_common())})" if failed else ""
    lost = Counter(record["reads"] for record in good if record["reads"] != "all masked")
    followed = len(good) - lost.total()
    unfollowed = "; ".join(f"{n} {reason}" for reason, n in lost.most_common()) or "none could not be followed"
    fed = {record["model"]: record["weights"] / max(1, record["weights"] + sum(record["missed"].values())) for record in good}
    least = min(fed, key=fed.__getitem__, default="-")
    kinds = Counter(record["model"].partition(":")[0] for record in records)
    libraries = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    return [
        f"- {len(good)} of {len(records)} models ({libraries}) convert to 2:4 and 4:16 with keys, order and class, and copy; "
        f"{len(records) - len(good)} fail{why};",
        f"- {followed} were followed through a forward pass of the converted model: every weight of the scheme is read masked "
        f"({unfollowed});",
        f"- sites hold {mean(record['share'] for record in good):.2%} of a model's parameters on average;",
        f"- of the weights that feed convolutions and matmuls {mean(fed.values()):.3%} are in sites on average; the least is "
        f"{fed.get(least, 0):.2%}, {least};",
    ]


def graph_summary(good: list[dict[str, Any]]) -> list[str]:
    """What torch.fx sees of the models."""
    parts = [record["fx"]["parts"] for record in good if record["fx"]["why"]]
    reach = {record["model"]: record["fx"]["share"] for record in good}
    least = min(reach, key=reach.__getitem__, default="-")
    span = f" ({min(parts)} to {max(parts)})" if parts else ""
    said = (
        f"the smallest reach is {reach[least]:.2%} of the sites' weights, {least}" if min(reach.values(), default=1) < 1 else ""
    )
    return [
        f"- {len(good) - len(parts)} trace in torch.fx at the root, {len(parts)} come in parts{span}; "
        f"{said or 'the graphs reach every site of every model'};"
    ]


def numerics_summary(good: list[dict[str, Any]], limit: float) -> list[str]:
    """What ran on the CPU, what came of it, and what did not run."""
    ran, left = [r for r in good if "train" in r], [r for r in good if "train" not in r]
    small = [record["model"] for record in left if record["parameters"] <= limit]
    assert not small, f"not run on the CPU though below --numerics {limit:g} (give the limit of the run): {small[:5]}"
    sites, zeros = sum(r["arrived"] for r in ran), [r["zeros"].get("2:4", 0.5) for r in ran]
    unmet = {r["model"]: len(r["unmet"]) for r in ran if r["unmet"]}
    where = f" ({one_line(str(unmet))})" if unmet else ""
    untrained = [record for record in ran if record["train"] != "exact"]
    lines = [
        f"- {len(ran)} ran on the CPU: dense conversion, masked against pre-masked in eval, after train() and eval(), baking "
        f"and checkpoint are exact, bit for bit; {sum(r['graph'] == 'exact' for r in ran)} fx graphs too;",
        f"- in these, {sites:,} sparse sites were looked at where a product receives them: each group of M holds at most N "
        f"non-zeros there (2:4: at least {min(zeros, default=0.5):.2%} zeros in every site); {sum(unmet.values())} sites are "
        f"not met by the eval forward pass{where};",
        f"- {len(ran) - len(untrained)} of these made a train step: outputs, gradients and buffers are exact; "
        f"{len(untrained)} made none{':' if untrained else ';'}",
    ]
    for reason in sorted({record["train"] for record in untrained}):
        names = [record["model"] for record in untrained if record["train"] == reason]
        lines.append(f"  - {reason}: {', '.join(names)};")
    return [*lines, f"- {len(left)} did not run on the CPU: they have more than {limit:,.0f} parameters."]


def skipped_summary(good: list[dict[str, Any]]) -> list[str]:
    """Every reason for which a parameter with two or more dimensions is no site."""
    tensors, weights, models = Counter[str](), Counter[str](), Counter[str]()
    for record in good:
        for size, reason in record["skipped"].values():
            tensors[reason] += 1
            weights[reason] += size
        models.update({reason for _, reason in record["skipped"].values()})
    rows = ((why, f"{models[why]:,}", f"{tensors[why]:,}", f"{n:,}") for why, n in weights.most_common())
    return markdown_table(("skipped, not read as weights", "models", "tensors", "weights"), rows)


def markdown_table(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    """A Markdown table, line by line."""
    head = list(columns)
    return ["| " + " | ".join(map(str, cells)) + " |" for cells in (head, ["---"] * len(head), *rows)]


def entry(record: dict[str, Any]) -> Entry:
    """One model in the packaged table."""
    numbers = (record[key] for key in ("model", "parameters", "sites", "weights", "macs"))
    checked = {"": "", "exact": "exact"}.get(record.get("train", ""), "eval")
    return Entry(*numbers, parts=record["fx"]["parts"], reach=record["fx"]["share"], numerics=checked)


def one_line(text: str) -> str:
    """Text without line breaks and bars."""
    return " ".join(text.split()).replace("|", "/")


def main() -> None:
    """Run what is missing, two at a time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="*")
    parser.add_argument("--retry", action="store_true", help="run models again whose line says that they failed")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", default="zoo.jsonl")
    parser.add_argument("--numerics", type=float, default=60e6, help="largest model, in parameters, to run on the CPU")
    parser.add_argument("--seconds", type=float, default=400)
    parser.add_argument("--memory", type=float, default=40, help="GiB of address space a process")
    parser.add_argument("--table", type=Path, help="only write the records, as Markdown, to this file (docs/zoo.md)")
    parser.add_argument("--csv", type=Path, default="nmfx/models/measured.csv", help="with --table: the packaged table")
    args = parser.parse_args()
    out = Path(args.out)
    if args.table:
        date = time.strftime("%Y-%m-%d", time.gmtime(out.stat().st_mtime))  # when the last model was done
        write_table([json.loads(line) for line in out.read_text().splitlines()], date, args.numerics, args.table, args.csv)
        return
    records = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = {record["model"] for record in records if record["ok"] or not args.retry}
    globs = args.only.split(",")
    names = [n for n in list_models() if any(fnmatch.fnmatch(n, glob) for glob in globs) and n not in done]
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
