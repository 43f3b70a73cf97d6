"""Damaged and hostile files of every kind that nmfx reads, against one law: an NmfxError that names the file, or a value that
an independent reading of the file agrees with; within 1 GiB and 10 s of a processor, and a given model unchanged by an error.

    python tests/fuzz/fuzz.py --seed 0 --checkpoints 10000 --schemes 10000 --recipes 3000 --states 3000 \\
        --work 1000 --stamps 1000 --times 1000 --compiled 3000 --int8 3000
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import json
import math
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import safetensors.torch
import torch
import yaml
from mutations import mutate_bytes, mutate_tree, to_json, to_yaml
from torch import Tensor, nn

from nmfx.data.source import open_data
from nmfx.demo.digits import load_demo
from nmfx.errors import NmfxError
from nmfx.export.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from nmfx.masking.sites import masked_sites
from nmfx.models.census import find_sites
from nmfx.passes.transform import transform
from nmfx.passes.verification import verify
from nmfx.recipe.loader import find_recipe, load_recipe
from nmfx.runtime.compiled import CompiledModel, Lowered
from nmfx.runtime.compiler import compile
from nmfx.runtime.layers import Depthwise, dense_layers, sparse_layer
from nmfx.runtime.layout.tiles import Tile
from nmfx.runtime.lowering.exporting import export
from nmfx.runtime.lowering.fusion import lower
from nmfx.runtime.measuring import timing
from nmfx.runtime.saved.reading import load_compiled
from nmfx.scheme import Scheme
from nmfx.search import domino_run as search_run
from nmfx.search.domino_loop import DominoSearch
from nmfx.settings.training import Settings
from nmfx.stages.stamp import Stamp, read_stamp, write_stamp
from nmfx.stages.work import open_work
from nmfx.training import trainer
from nmfx.training.finetuning import finetune

SECONDS, BYTES = 10.0, 1 << 30
Case = Callable[[random.Random], str]  # one damaged file, read: what came of it


class Broken(AssertionError):
    """The law does not hold."""


def need(holds: Any, what: str) -> None:
    """Raise unless it holds."""
    if not holds:
        raise Broken(what)


@contextlib.contextmanager
def bounded(file: Path) -> Iterator[None]:
    """Reading within the limits; only an NmfxError that names the file, in one printable line, may come out."""
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        yield
    except NmfxError as error:
        need(str(file) in str(error) or str(file.parent) in str(error), f"the file is not named: {error}")
        need(str(error).isprintable() and len(str(error)) < 2000, f"not one short line: {error!r}")
        raise
    finally:
        seconds, grown = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        need(seconds < SECONDS, f"{seconds:.1f} s")
        need(grown * 1024 < BYTES + 10 * file.stat().st_size, f"{grown} kB more")


# --- checkpoints and states: tensors under a header


class Net(nn.Module):
    """A convolution, statistics, and two linears of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.norm(self.conv(x)).mean((2, 3))))


def facts(model: nn.Module) -> dict[str, Any]:
    """All of a model that a load could change."""
    found: dict[str, Any] = {name: value.clone() for name, value in (*model.named_parameters(), *model.named_buffers())}
    found |= {f"module {path}": (type(m), m.training) for path, m in model.named_modules()}
    return found | {f"site {site.path}.{site.attr}": site.spec for site in masked_sites(model)}


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two facts agree, NaN with NaN."""
    same = lambda x, y: (  # noqa: E731
        x.dtype == y.dtype and x.shape == y.shape and torch.equal(x.nan_to_num(), y.nan_to_num())
        if isinstance(x, Tensor)
        else x == y
    )
    return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)


@dataclass
class Sealed:
    """A file of tensors, taken apart."""

    content: dict[str, Any]
    tensors: dict[str, Tensor]

    @staticmethod
    def of(path: Path) -> Sealed:
        with safetensors.safe_open(path, "pt") as file:
            return Sealed(json.loads(file.metadata()["nmfx"]), {name: file.get_tensor(name).clone() for name in file.keys()})  # noqa: SIM118

    def to_bytes(self, *, seal: bool) -> bytes:
        content = self.content
        if seal and isinstance(content, dict):
            digest = hashlib.sha256(to_json({k: v for k, v in content.items() if k != "digest"}).encode())
            for name in sorted(self.tensors):
                value = self.tensors[name]
                digest.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
                digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
            content = content | {"digest": digest.hexdigest()} if "digest" in content else content
        return safetensors.torch.save(self.tensors, {"nmfx": to_json(content)})

    def mutated(self, pick: random.Random) -> Sealed:
        """With a header, or tensors, or both, that are others."""
        content, tensors = self.content, dict(self.tensors)
        if pick.random() < 0.75:
            content = mutate_tree(content, pick)
        if content is self.content or pick.random() < 0.2:
            name = pick.choice(list(tensors))
            value, kind = tensors[name], pick.randrange(7)
            if kind == 0:
                del tensors[name]
            elif kind == 1:
                tensors[name + "x"] = tensors.pop(name)
            elif kind == 2:
                tensors[name] = value.to(pick.choice((torch.float16, torch.uint8, torch.int64, torch.bool, torch.float64)))
            elif kind == 3:
                tensors[name] = value.reshape(-1)[: pick.randrange(value.numel() + 1)].clone()
            elif kind == 4:
                tensors[name] = value.unsqueeze(0)
            elif kind == 5:
                other = pick.choice(list(tensors))
                tensors[name], tensors[other] = tensors[other].clone(), value.clone()
            elif value.numel():
                flat = bytearray(value.reshape(-1).view(torch.uint8).numpy().tobytes())
                for _ in range(pick.choice((1, 5))):
                    flat[pick.randrange(len(flat))] = pick.randrange(256 if value.dtype != torch.bool else 2)
                tensors[name] = torch.frombuffer(flat, dtype=value.dtype).reshape(value.shape)
        return Sealed(content, tensors)


def damaged(original: Sealed, whole: bytes, pick: random.Random) -> tuple[bytes, Sealed | None]:
    """A damaged file, and what is in it when its digest is right."""
    if pick.random() < 0.25:
        return mutate_bytes(whole, pick), None
    while True:
        other, seal = original.mutated(pick), pick.random() < 0.85
        with contextlib.suppress(UnicodeEncodeError, ValueError):  # names and numbers that no file can hold
            return other.to_bytes(seal=seal), other if seal else None


def checkpoints(folder: Path) -> Case:
    """Checkpoints, loaded into a given model or rebuilt."""
    path, example, sources = folder / "model.safetensors", torch.zeros(1, 8, 2, 2), []
    torch.manual_seed(0)
    for training in ("sr-ste", "fixed"):
        sources.append(transform(Net().eval(), "2:4", example_input=example, training=training))  # type: ignore[arg-type]
    sources.append(transform(load_demo(trained=True), "2:16", example_input=torch.zeros(1, 1, 8, 8)))
    files = []
    for model in sources:
        save_checkpoint(model, path, info={"method": "fuzz"})
        files.append((Sealed.of(path), path.read_bytes(), model))
    givens = [copy.deepcopy(model) for _, _, model in files]
    before = [facts(model) for model in givens]

    def case(pick: random.Random) -> str:
        index = pick.choice((0, 0, 1, 1, 2))
        original, whole, _ = files[index]
        content, other = damaged(original, whole, pick)
        path.write_bytes(content)
        given = None if index == 2 and pick.random() < 0.7 else givens[index]
        try:
            with bounded(path):
                loaded = load_checkpoint(path, given)
        except NmfxError:
            need(given is None or equal(facts(givens[index]), before[index]), "a load that failed has changed the model")
            return "refused"
        if given is not None:
            givens[index] = copy.deepcopy(files[index][2])
            before[index] = facts(givens[index])
        header, tensors = read_checkpoint(path)
        if other is None:
            need(equal(tensors, original.tensors), "other tensors than written, and the digest is right")
            return "as written"
        need(header.aliases == other.content["aliases"] and header.info == other.content["info"], "another header")
        for name, site in other.content["sites"].items():
            mine = header.sites[name]
            said = (str(mine.pattern).split(":"), list(mine.rows), list(mine.shape), mine.decay, mine.frozen, mine.flat)
            expected = ([str(int(n)) for n in site["pattern"].split(":")], site["rows"], site["shape"], site["decay"])
            need(said == (*expected, site["frozen"], site["flat"]), f"{name}: {said} is not {site}")
        state = loaded.state_dict()
        need(equal(other.tensors, tensors), "other tensors than in the file")
        need(
            equal(
                {k: v for k, v in other.tensors.items() if ":" not in k}, {k: state[k] for k in other.tensors if ":" not in k}
            ),
            "state",
        )
        for name in other.content["sites"]:
            if name not in header.aliases:
                kept = state[name].reshape(-1)[masks(loaded)[name].reshape(-1)]
                need(torch.equal(kept.nan_to_num(), other.tensors[f"{name}:values"].nan_to_num()), f"{name}: other values")
        verify(loaded)
        return "another valid file"

    return case


def masks(model: nn.Module) -> dict[str, Tensor]:
    """Masks by the names of their weights."""
    return {f"{site.path}.{site.attr}": site.mask for site in masked_sites(model)}


def states(folder: Path) -> Case:
    """States of a search and of a fine-tuning run, resumed."""
    torch.manual_seed(0)
    path = folder / "search.safetensors"
    search = DominoSearch(Net().train(), 0.5, example_input=torch.zeros(2, 8, 2, 2), vote_every=1, penalty_every=1, decay=5.0)
    optimizer = torch.optim.SGD(search.model.parameters(), lr=0.1)
    for _ in range(6):
        optimizer.zero_grad()
        search.model(torch.randn(4, 8, 2, 2)).square().mean().backward()
        search.step()
        optimizer.step()
    settings = {"target": "0.5", "seed": 0}
    search_run._save(path, search, settings)
    runs: list[tuple[Path, Callable[[], nn.Module], Callable[[], Any]]] = []
    runs.append((path, lambda: search.model, lambda: search_run._load(path, search, settings)))
    demo = transform(load_demo(trained=True), "2:16", example_input=torch.zeros(1, 1, 8, 8), training="fixed")
    data = open_data("digits")
    data = replace(data, **{part: few(getattr(data, part)) for part in ("train", "validation")})
    options = Settings(epochs=2, batch_size=32, lr=0.02, opt="adamw")
    finetune(copy.deepcopy(demo), data, settings=replace(options, epochs=1), folder=folder / "tuned")
    sealed = Sealed.of(folder / "tuned" / trainer.LAST)
    sealed.content["about"]["identity"]["epochs"] = options.epochs  # as if it had been stopped after its first epoch
    (folder / "tuned" / trainer.LAST).write_bytes(sealed.to_bytes(seal=True))
    identity = sealed.content["about"]["identity"]
    tuned = trainer.Run(demo, data, options, None, None, None, identity)
    runs.append((folder / "tuned" / trainer.LAST, lambda: tuned.model, lambda: tuned._resume(folder / "tuned")))
    files = []
    for file, _, load in runs:
        files.append((Sealed.of(file), file.read_bytes()))
        load()

    def case(pick: random.Random) -> str:
        index = pick.randrange(len(runs))
        (path, model, load), (original, whole) = runs[index], files[index]
        content, other = damaged(original, whole, pick)
        path.write_bytes(content)
        before = facts(model())
        try:
            with bounded(path):
                load()
        except NmfxError:
            need(equal(facts(model()), before), "a state that was refused has changed the model")
            return "refused"
        state = {k: v for k, v in model().state_dict().items() if not k.endswith("_mask")}
        source = original if other is None else other
        stored = {k.removeprefix("model."): v for k, v in source.tensors.items() if k.startswith("model.")}
        need(equal({k: state[k].to(v.dtype) for k, v in stored.items()}, stored), "other weights than in the file")
        path.write_bytes(whole)
        load()
        return "as written" if other is None else "another valid file"

    return case


def few(pictures: Any) -> Any:
    """The first 64."""
    return replace(pictures, pictures=pictures.pictures[:64], labels=pictures.labels[:64])


# --- texts


def yaml_case(path: Path, texts: list[str], load: Callable[[], Any], agree: Callable[[Any, Any], None]) -> Case:
    """YAML, damaged as bytes and as a tree; `agree` compares what came with PyYAML's own reading of the text."""
    trees = [yaml.load(text, yaml.BaseLoader) for text in texts]

    def case(pick: random.Random) -> str:
        index = pick.randrange(len(texts))
        if isinstance(trees[index], dict) and pick.random() < 0.6:
            content = to_yaml(mutate_tree(trees[index], pick), pick).encode("utf-8", "surrogatepass")
        else:
            content = mutate_bytes(texts[index].encode(), pick)
        path.write_bytes(content)
        try:
            with bounded(path):
                value = load()
        except NmfxError:
            return "refused"
        agree(value, yaml.load(content.decode(), yaml.BaseLoader))
        return "as written" if content == texts[index].encode() else "another valid file"

    return case


def schemes(folder: Path) -> Case:
    """Schemes in YAML and in the published format."""
    sites, path = find_sites(Net().eval(), torch.zeros(1, 8, 2, 2)), folder / "scheme.yaml"
    scheme = Scheme.uniform(sites, "2:4")
    texts = [scheme.to_yaml(sites), scheme.to_yaml(), replace(scheme, info={"model": "a", "m": "4, 8"}).to_yaml()]
    texts.append(scheme.to_published(sites))

    def agree(value: Scheme, tree: Any) -> None:
        if "nmfx" not in tree:  # the published format is YAML as well
            need(
                {f"{int(n)}:{int(m)}" for n, m in tree.values() if int(n) != int(m)} == set(map(str, value.values())),
                "other patterns",
            )
            return
        found = {name: str(pattern) for name, pattern in value.items()}
        written = {name: ":".join(str(int(n)) for n in p.split(":")) for name, p in tree["patterns"].items() if p != "dense"}
        written = {name: p for name, p in written.items() if len(set(p.split(":"))) == 2}
        need(found == written, f"{found} is not {written}")
        shapes = {name: tuple(map(int, shape.split("x"))) for name, shape in tree.get("shapes", {}).items()}
        need(dict(value.shapes) == shapes, "other shapes")
        need(all(value.info[key] == tree[key] for key in value.info), "other words")

    def load() -> Scheme:
        return Scheme.load(path, sites) if path.read_bytes().lstrip()[:1] == b"{" or time.time_ns() % 2 else Scheme.load(path)

    return yaml_case(path, texts, load, agree)


def recipes(folder: Path) -> Case:
    """Recipes, of every section."""
    names = ("digits", "digits-sparser", "resnet50-0.80", "resnet56-cifar100-4x-params", "e5")
    texts = [find_recipe(name).read_text() for name in names]
    texts.append(
        "model: {name: timm:resnet18, kwargs: {num_classes: 10, in_chans: 1, drop_rate: 0.1}, input_size: 1x28x28}\n"
        "search: {method: knapsack, limits: {params: 0.125, macs: 4x}, m: [8, 16], min_density: {'layer1*': 0.5}}\n"
    )

    def agree(value: Any, tree: Any) -> None:
        need(value.model.name and finite(value), "numbers without end")
        if "base" not in tree:
            need(value.model.name == tree["model"]["name"], "another model")

    path = folder / "recipe.yaml"
    return yaml_case(path, texts, lambda: load_recipe(path), agree)


def finite(value: Any) -> bool:
    """Whether all numbers in frozen dataclasses are finite."""
    if is_dataclass(value):
        return all(finite(getattr(value, field.name)) for field in fields(value))
    return not isinstance(value, float) or math.isfinite(value)


def works(folder: Path) -> Case:
    """work.yaml, and now and then the model that it asks for."""
    path, turn = folder / "work.yaml", [0]
    head = {"nmfx": "work", "version": 1, "weights": "random", "note": "no network", "input_size": "1x8x8"}
    texts = [
        yaml.safe_dump(head | {"model": model, "kwargs": json.dumps(kwargs)}, sort_keys=False)
        for model, kwargs in (
            ("demo:digits", {}),
            ("demo:resnet20", {"num_classes": 7}),
            ("timm:test_vit", {"img_size": [32, 32]}),
        )
    ]

    def load() -> Any:
        work = open_work(folder)
        turn[0] += 1
        if turn[0] % 8 == 0:
            work.load()
        return work

    def agree(value: Any, tree: Any) -> None:
        need((value.model, value.weights, value.note) == (tree["model"], tree["weights"], tree.get("note", "")), "other words")
        said = json.loads(tree.get("kwargs", "{}"))
        need(json.loads(json.dumps(dict(value.kwargs))) == said, f"{value.kwargs} is not {said}")

    return yaml_case(path, texts, load, agree)


def json_case(path: Path, load: Callable[[], Any], agree: Callable[[Any, Any], None]) -> Case:
    """JSON; what cannot be read is None."""
    text = path.read_text()
    tree = json.loads(text)

    def case(pick: random.Random) -> str:
        content = mutate_bytes(text.encode(), pick) if pick.random() < 0.4 else to_json(mutate_tree(tree, pick)).encode()
        path.write_bytes(content)
        with bounded(path):
            value = load()
        if value is None:
            return "refused"
        agree(value, json.loads(content))
        return "another valid file"

    return case


def stamps(folder: Path) -> Case:
    """Stamps of a recipe's stages."""
    one = Stamp(
        {"epochs": 3, "lr": 0.1, "model": "a", "limits": {"params": 0.5}}, "0123456789abcdef", {"a.yaml": "00", "b/c": "11"}
    )
    write_stamp(folder, "search", one)

    def agree(value: Stamp, tree: Any) -> None:
        need(
            (value.settings, value.before, value.outputs) == (tree["settings"], tree["before"], tree["outputs"]),
            "another stamp",
        )
        value.reason(one, folder)
        need(len(value.fingerprint) == 16, "no fingerprint")

    return json_case(folder / "stages" / "search.json", lambda: read_stamp(folder, "search"), agree)


def times(folder: Path) -> Case:
    """Measured times in the cache."""
    one = timing.Times()
    one.path = folder / "times.json"
    one.get("question", ("a", "b"), lambda: {"a": lambda: None, "b": lambda: sum(range(9))})
    one.save()

    def agree(value: Any, tree: Any) -> None:
        need(value == tree["known"], "other times")

    return json_case(one.path, lambda: kept.known if (kept := one._kept()) else None, agree)


class Pictures(nn.Module):
    """Convolutions on lanes, one by channel, a pooling, a residual, sizes that hang on the batch, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.by_channel = (
            nn.Conv2d(3, 8, 3, 2, 1),
            nn.Conv2d(8, 8, 3, 1, 1),
            nn.Conv2d(8, 8, 3, 1, 1, groups=8),
        )
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.one(x).relu(), 3, 2, 1)
        x = self.norm(self.two(self.by_channel(x)).add(x).relu())
        return self.head(x.reshape(x.shape[0] * 2, 4, -1).softmax(-1).reshape(x.shape[0], 8, -1).mean(2))


def compiled(folder: Path) -> Case:
    """Compiled models, loaded and called."""
    path, x = folder / "model.nmfxc", torch.randn(2, 3, 32, 32)
    torch.manual_seed(0)
    graph, domain = export(Pictures().eval(), x)
    for number, (node, fused) in enumerate(lower(graph)):
        sparse = Depthwise(fused, lanes=True) if fused.depthwise else sparse_layer(fused, Tile(lanes=True))
        graph.add_submodule(str(node.target), next(iter(dense_layers(fused).values())) if number == 0 else sparse)
    graph.recompile()
    CompiledModel(Lowered(graph, domain, (), 2), shapes=0).save(path)
    return called(path, x)


def compiled_int8(folder: Path) -> Case:
    """Compiled models in int8, loaded and called."""
    path, x = folder / "model.nmfxc", torch.randn(2, 3, 32, 32)
    torch.manual_seed(0)
    compile(Pictures().eval(), x, precision="int8", calibration=x).save(path)
    return called(path, x)


def called(path: Path, x: Tensor) -> Case:
    """What comes of a damaged compiled model that is called."""
    original, whole = Sealed.of(path), path.read_bytes()

    def case(pick: random.Random) -> str:
        content, other = damaged(original, whole, pick)
        path.write_bytes(content)
        try:
            with bounded(path):
                loaded = load_compiled(path)
                need(other is not None or content == whole, "a damaged file was read")
                if loaded._first.domain.takes(x):
                    loaded(x)
        except NmfxError:
            return "refused"
        return "another valid file"

    return case


KINDS: dict[str, Callable[[Path], Case]] = {
    "checkpoints": checkpoints,
    "schemes": schemes,
    "recipes": recipes,
    "states": states,
    "work": works,
    "stamps": stamps,
    "times": times,
    "compiled": compiled,
    "int8": compiled_int8,
}


def fuzz(kind: str, count: int, seed: int) -> Counter[str]:
    """Read `count` damaged files of a kind; how often what came of it.

    Raises:
        Broken: the law does not hold; the message says which case, and another exception is its cause.
    """
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        case = KINDS[kind](Path(name))
        for number in range(count):
            try:
                outcomes[case(random.Random(f"{kind} {seed} {number}"))] += 1
            except Exception as error:
                raise Broken(f"{kind}, seed {seed}, case {number}: {type(error).__name__}: {error}"[:2000]) from error
    return outcomes


def main() -> int:
    """Fuzz every kind as often as asked; 1 if a law does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    for kind in KINDS:
        parser.add_argument(f"--{kind}", type=int, default=0, metavar="COUNT")
    args = vars(parser.parse_args())
    timing.machine = lambda: {"processor": "of the fuzzer"}  # or the kernel would be built
    for kind in KINDS:
        if count := args[kind]:
            start = time.perf_counter()
            outcomes = fuzz(kind, count, args["seed"])
            said = ", ".join(f"{number:,} {what}" for what, number in outcomes.most_common())
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
            print(f"{kind}: {count:,} files, {said}; {time.perf_counter() - start:.0f} s, peak {peak} MiB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
