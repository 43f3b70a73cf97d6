"""Laws of recipe files: every packaged one is right, a wrong word is named with its file, its key and the nearest one."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import yaml
from cases import cases

from nmfx.errors import NmfxError
from nmfx.models.census import find_sites
from nmfx.models.site import Sites
from nmfx.models.source import Source, find_source
from nmfx.recipe.loader import find_recipe, load_recipe, packaged_recipes
from nmfx.recipe.schema import Recipe
from nmfx.search.problem import make_problem
from nmfx.settings.methods import METHODS
from nmfx.settings.target import parse_target
from nmfx.settings.training import Augment, Settings
from nmfx.sparsity.pattern import Pattern
from nmfx.stages.search import choose
from nmfx.stages.work import example_of

ROOT = Path(__file__).parents[2]
HEAD = "model:\n  name: demo:digits\nsearch:\n  target: 0.5\n"
DATA = "data:\n  name: digits\n"
UNIFORM = {"4-16": 4, "2-16": 8, "1-16": 16, "2-32": 16}  # times fewer


@pytest.fixture
def write(tmp_path: Path):
    def written(content: str, name: str = "mine") -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(content)
        return path

    return written


@cache
def sites_of(name: str, kwargs: tuple[tuple[str, object], ...]) -> Sites:
    model = Source(*str(find_source(name)).split(":"), dict(kwargs)).build_meta()
    return find_sites(model, example_of(model, None))


@cases(packaged_recipes())
def test_a_packaged_recipe_poses_a_problem(name: str) -> None:
    recipe = load_recipe(name)
    sites = sites_of(recipe.model.name, tuple(sorted(recipe.model.kwargs.items())))
    search = recipe.search
    if search.pattern is not None:
        chosen = choose(search, None, sites)  # type: ignore[arg-type]
        totals = chosen.scheme.totals(sites)
        assert chosen.result is None
        fewer = next((times for end, times in UNIFORM.items() if name.endswith(f"uniform-{end}")), 1)
        assert totals.kept == totals.weights // fewer
        assert totals.kept_macs == totals.macs // fewer
        return
    problem = make_problem(
        sites,
        target=search.target,
        budget=search.budget,
        limits=search.limits,
        mixed=METHODS[search.method].mixed,
        **{name: getattr(search.choices, name) for name in search.choices.__dataclass_fields__},
    )
    assert problem.budget.target == parse_target(search.target)
    if name.startswith("resnet"):
        assert len(problem.free) == len(sites)  # flat: the stem too
    assert recipe.finetune is not None


@cases(packaged_recipes())
def test_a_packaged_recipe_opens_with_what_it_is(name: str) -> None:
    lines = packaged_recipes()[name].read_text().splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["# Purpose", "# Command"]
    assert f"nmfx run {name}" in lines[1]
    assert any(line.startswith("# Expected") for line in lines[2:4])
    assert any(line.startswith("# Needs: ") for line in lines[2:5])


def test_all_of_the_paper_is_there() -> None:
    assert {
        *("resnet50-0.80", "resnet50-0.875", "resnet50-0.9375", "resnet50-8x-macs", "resnet50-16x-macs"),
        *("resnet18-0.875", "resnet18-8x-macs", "regnetx-3.2g-8x-macs", "digits", "fashion-mnist"),
        *("e3", "e4", "e5", "e6", "e7"),
        *(f"resnet50-uniform-{end}" for end in UNIFORM),
        *(f"{model}-asp-{kind}" for model in ("resnet50", "resnet18") for kind in ("0.875", "uniform-2-16")),
        *(f"resnet56-cifar100-{x}-{kind}{eta}" for x in ("4x", "8x") for kind in ("params", "macs") for eta in ("", "-no-eta")),
    } <= set(packaged_recipes())  # fmt: skip


def test_the_published_numbers() -> None:
    recipe = load_recipe("resnet50-0.80")
    assert recipe.finetune is not None
    settings = recipe.finetune.settings
    assert (settings.epochs, settings.batch_size, settings.lr, settings.weight_decay) == (120, 256, 0.01, 5e-5)
    assert (recipe.finetune.training, recipe.finetune.decay, recipe.search.looping) == ("sr-ste", 5e-4, True)
    wide = load_recipe("resnet50-16x-macs").search
    assert (wide.choices.m, wide.budget, wide.target) == (32, "macs", "16x")
    assert load_recipe("resnet56-cifar100-8x-macs-no-eta").search.loop.eta is False
    assert load_recipe("e7").finetune.training == "fixed"  # type: ignore[union-attr]
    assert load_recipe("e3").finetune.weights == "none"  # type: ignore[union-attr]


def test_every_type_is_read(write) -> None:
    recipe = load_recipe(write(
        """
model:
  {name: demo:resnet20, weights: none, input_size: 1x28x28,
   kwargs: {num_classes: 7, in_chans: 1, drop_rate: 1e-3, qkv_bias: true}}
data: {name: folder, held_back: .2, workers: 2}
search:
  method: knapsack
  limits: {params: 0.125, macs: 4x}
  m: [8, 16]
  keep_dense: ["fc.*"]
  min_density: {"layer1*": 0.5, "*": 1e-2}
  sensitivity: activation
  data: true
  pictures: 64
finetune:
  amp: bf16
  warmup_epochs: 1
  epochs: 3
  compile: inductor
  augment: {hflip: 0, scale: [0.5, 1], auto_augment: rand-m9}
export: {baked: true}
evaluate:
"""
    ))  # fmt: skip
    assert recipe.model.kwargs == {"num_classes": 7, "in_chans": 1, "drop_rate": 1e-3, "qkv_bias": True}
    assert recipe.model.size == (1, 28, 28)
    assert recipe.search.limits == {"params": 0.125, "macs": "4x"}
    assert (recipe.search.choices.m, recipe.search.choices.keep_dense) == ((8, 16), ("fc.*",))
    assert recipe.search.choices.min_density == {"layer1*": 0.5, "*": 0.01}
    assert recipe.finetune is not None
    assert recipe.finetune.settings == Settings(
        amp="bf16",
        warmup_epochs=1.0,
        epochs=3,
        compile="inductor",
        augment=Augment(hflip=0.0, scale=(0.5, 1.0), auto_augment="rand-m9"),
    )
    assert recipe.export.baked
    assert load_recipe(write(HEAD.replace("target: 0.5", "pattern: 2:4"))).search.pattern == Pattern("2:4")
    assert yaml.safe_load("2:4") == 124  # what this file is read without


def test_a_base_gives_all_but_what_is_said(write) -> None:
    write(HEAD + DATA + "finetune:\n  epochs: 3\n  lr: 0.5\n", "first")
    changed = load_recipe(write("base: first\nsearch:\n  target: null\n  pattern: dense\nfinetune:\n  epochs: 2\n"))
    assert changed.finetune is not None
    assert (changed.finetune.settings.epochs, changed.finetune.settings.lr) == (2, 0.5)
    assert changed.search.pattern == Pattern.DENSE
    assert load_recipe(write("base: first\nfinetune: null\n")).finetune is None
    write("base: first\n", "second")
    with pytest.raises(NmfxError, match=r"mine.yaml: base: second has a base itself; start from 'first'"):
        load_recipe(write("base: second\n"))
    with pytest.raises(NmfxError, match=r"no recipe file is called 'frst'"):
        load_recipe(write("base: frst\n"))
    assert load_recipe(write("base: digits\n")) == load_recipe("digits")


def test_the_place_of_the_data_is_not_the_recipes_business(write) -> None:
    recipe = load_recipe("resnet50-0.80", data_root="/pictures")
    assert recipe.data is not None
    assert recipe.data.root == "/pictures"
    with pytest.raises(NmfxError, match="has no data section"):
        load_recipe(write(HEAD), data_root="/pictures")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("modle:\n  name: a\n" + HEAD, "mine.yaml: unknown key 'modle' (did you mean 'model'?)"),
        (HEAD + DATA + "finetune:\n  epoch: 3\n", "mine.yaml: finetune: unknown key 'epoch' (did you mean 'epochs'?)"),
        (HEAD + DATA + "finetune:\n  workers: 3\n", "mine.yaml: finetune: unknown key 'workers'"),
        (HEAD + DATA + "finetune:\n  augment: {mixpu: 1}\n", "finetune.augment: unknown key 'mixpu' (did you mean 'mixup'?)"),
        (HEAD + "  keep_dens: [a]\n", "mine.yaml: search: unknown key 'keep_dens' (did you mean 'keep_dense'?)"),
        (HEAD + DATA + "finetune:\n  epochs: ten\n", "mine.yaml: finetune.epochs: expected a whole number, 1 to 1000000"),
        (HEAD + DATA + "finetune:\n  epochs: 1_0\n", "mine.yaml: finetune.epochs: expected a whole number, 1 to 1000000"),
        (HEAD + DATA + "finetune:\n  lr: nan\n", "mine.yaml: finetune.lr: expected a number, above 0, found 'nan'"),
        (HEAD + DATA + "finetune:\n  lr: [1]\n", "mine.yaml: finetune.lr: expected a number, above 0, found a list"),
        (HEAD + DATA + "finetune:\n  channels_last: yes\n", "finetune.channels_last: expected true or false, found 'yes'"),
        (HEAD + DATA + "finetune:\n  amp: fp16\n", "amp: expected one of none, bf16, found 'fp16' (did you mean 'bf16'?)"),
        (HEAD + DATA + "finetune:\n  training: srste\n", "did you mean 'sr-ste'?"),
        (HEAD + DATA + "finetune:\n  epochs: 0\n", "mine.yaml: finetune.epochs: expected a whole number, 1 to 1000000"),
        (HEAD + DATA + "finetune:\n  decay: -1\n", "mine.yaml: finetune.decay: expected a number, 0 or more"),
        (HEAD + DATA + "finetune:\n  augment: {scale: [1]}\n", "finetune.augment.scale: expected a list of 2, found a list"),
        (HEAD + "  keep_dense: fc\n", "mine.yaml: search.keep_dense: expected a list, as [a, b], found 'fc'"),
        (HEAD + "  m: 4.5\n", "mine.yaml: search.m: expected"),
        (HEAD + "  method: dominoo\n", "mine.yaml: search: unknown method 'dominoo' (did you mean 'domino'?)"),
        (HEAD + "  scheme: a.yaml\n", "mine.yaml: search: 'target' says nothing beside 'scheme'"),
        (HEAD + "  pattern: 2:4\n", "mine.yaml: search: 'target' says nothing beside 'pattern'"),
        (HEAD.replace("target: 0.5", "pattern: 4:2"), "mine.yaml: search.pattern: '4:2': expected 1 <= N <= M <= 64"),
        (HEAD.replace("0.5", "875"), "mine.yaml: search: target 875: expected a sparsity"),
        (HEAD + "  limits: {params: 0.5}\n", "mine.yaml: search: 'limits' says the budget; leave 'target' and 'budget' out"),
        (
            HEAD + "  patterns: [2:4]\n  m: 8\n",
            "search: 'patterns' says all patterns; leave 'm', 'candidates' and 'vector' out",
        ),
        (HEAD + "  target_latency: 2x\n", "'target_latency' says the budget; leave 'target', 'budget' and 'limits' out"),
        (HEAD + "  budget: latency\n  method: erk\n", "mine.yaml: search: times are the knapsack's and spdy's to budget"),
        (HEAD + "  method: domino\n  sensitivity: gradient\n", "'sensitivity' is the knapsack's; method domino has none"),
        (HEAD + "  eta: false\n", "search: 'eta' is of the published loop: it needs 'method' domino with 'data: true'"),
        (HEAD + "  data: true\n", "search with data: true needs a data section"),
        (HEAD + DATA + "  method: spdy\n", "mine.yaml: data: unknown key 'method'"),
        (HEAD + "  method: spdy\n", "mine.yaml: search: method spdy looks at pictures: give 'data: true'"),
        (HEAD + "  method: erk\n  data: true\n", "mine.yaml: search: method erk looks at no pictures; leave 'data' out"),
        (HEAD + "finetune:\n", "mine.yaml: finetune needs a data section"),
        (HEAD + "export: true\n", "mine.yaml: export: expected keys with values, found 'true'"),
        ("model:\n  name: a\n", "mine.yaml: key 'search' is missing"),
        ("search:\nmodel:\n  weights: none\n", "mine.yaml: model: key 'name' is missing"),
        (HEAD.replace("demo:digits", "demo:digits\n  input_size: 0x8"), "mine.yaml: model: input_size 0x8"),
        ("- a\n", "mine.yaml: expected a YAML mapping, found list"),
        (HEAD + "search:\n", "key 'search' appears twice"),
        ("base: [a]\n", "mine.yaml: base: expected the name of a recipe beside it or of nmfx, found a list"),
        ("base: ../a\n", "mine.yaml: base: expected the name of a recipe beside it or of nmfx, found '../a'"),
        ("a: !!python/name:os.system\n", "mine.yaml: not valid YAML: line 1: aliases (*), anchors (&) and tags (!)"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(content: str, message: str, write) -> None:
    with pytest.raises(NmfxError) as caught:
        load_recipe(write(content))
    assert message in str(caught.value)


def test_a_name_that_is_none_lists_the_packaged_ones() -> None:
    with pytest.raises(
        NmfxError, match=r"'digit' \(did you mean 'digits'\?\); packaged: digits, digits-sparser, e3, .*resnet50-0.80"
    ):
        find_recipe("digit")
    assert find_recipe("digits") == find_recipe(ROOT / "recipes" / "digits.yaml")
    assert isinstance(load_recipe(find_recipe("digits")), Recipe)
