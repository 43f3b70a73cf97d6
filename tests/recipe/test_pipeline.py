"""Laws of a run: what is done is not done again, what changed is, and a folder is what the other commands take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nmfx.data.config import picture_config
from nmfx.data.loader import validation_loader
from nmfx.data.source import open_data
from nmfx.errors import ModelError, NmfxError
from nmfx.export.checkpoint import load_checkpoint, read_checkpoint
from nmfx.passes import resuming
from nmfx.recipe.check import check_recipe
from nmfx.recipe.loader import load_recipe
from nmfx.recipe.schema import Recipe
from nmfx.scheme import Scheme
from nmfx.settings.choices import Choices
from nmfx.settings.search import DominoSettings, SearchSettings
from nmfx.settings.stages import CorrectSettings, ModelSettings
from nmfx.sparsity.pattern import Pattern
from nmfx.stages.build import build, build_weights, create
from nmfx.stages.data import open_pictures
from nmfx.stages.evaluate import read_scores
from nmfx.stages.pipeline import Pipeline
from nmfx.stages.work import CORRECTING, open_work
from nmfx.training.evaluation import evaluate

ALL = ["build", "search", "finetune", "export", "evaluate"]


def quick(**settings: object) -> Recipe:
    """The packaged digits recipe, one epoch, without correction."""
    recipe = load_recipe("digits")
    assert recipe.finetune is not None
    tuned = replace(recipe.finetune, settings=replace(recipe.finetune.settings, **{"epochs": 1, **settings}))  # type: ignore
    return replace(recipe, finetune=tuned, correct=None)


def run(recipe: Recipe, folder: Path) -> list[str]:
    """Run what has to be run; the names of those stages."""
    pipeline, ran = Pipeline(recipe, folder), []
    for stage in pipeline.stages:
        if pipeline.reason(stage):
            pipeline.run(stage)
            ran.append(stage)
    return ran


def test_what_is_done_is_skipped_and_what_changed_runs_with_all_after_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run(quick(), folder) == ALL
    assert run(quick(), folder) == []
    other = Pipeline(quick(epochs=2), folder)
    assert [other.reason(stage) for stage in ALL[:3]] == ["", "", "changed: epochs 1 -> 2"]
    assert run(quick(epochs=2), folder) == ALL[2:]
    assert run(quick(epochs=2, save_seconds=1.0, tensorboard=True), folder) == []  # they change no weight
    recipe = quick(epochs=2)
    assert run(replace(recipe, evaluate=replace(recipe.evaluate, batch_size=100)), folder) == ["evaluate"]
    assert run(recipe, folder) == ["evaluate"]
    assert run(replace(recipe, export=replace(recipe.export, baked=False)), folder) == ALL[3:]
    assert not (folder / "export" / "digits.baked.safetensors").exists()
    assert run(replace(recipe, search=replace(recipe.search, target=0.75)), folder) == ALL[1:]
    assert run(replace(recipe, model=replace(recipe.model, weights="auto")), folder) == ALL  # all after it, the same or not


def test_a_correction_that_was_stopped_goes_on_in_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, folder = replace(quick(), correct=CorrectSettings(pictures=96), finetune=None), tmp_path / "run"
    assert run(recipe, tmp_path / "whole")[2] == "correct"
    lines: list[str] = []

    def stop(share: float, line: str = "") -> None:
        lines.append(line)
        if len(lines) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(resuming, "SHARE", 0)
    for stage in ("build", "search"):
        Pipeline(recipe, folder).run(stage)
    with pytest.raises(KeyboardInterrupt):
        Pipeline(recipe, folder).run("correct", stop)
    assert Pipeline(recipe, folder).reason("correct") == "it was stopped before its end"
    Pipeline(recipe, folder).run("correct", lambda share, line="": lines.append(line))
    assert len(lines) == len({line.partition(":")[0] for line in lines}) + 1 == 7  # only the one that was told last comes again
    for name in ("corrected/model.safetensors", CORRECTING):
        there, wanted = (place / name for place in (folder, tmp_path / "whole"))
        assert there.exists() == wanted.exists() == (name != CORRECTING)
        assert not there.exists() or there.read_bytes() == wanted.read_bytes()


def test_the_state_of_another_correction_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, folder = replace(quick(), correct=CorrectSettings(pictures=96), finetune=None), tmp_path / "run"

    def stop(share: float, line: str = "") -> None:
        if share > 0.4:
            raise KeyboardInterrupt

    monkeypatch.setattr(resuming, "SHARE", 0)
    for stage in ("build", "search"):
        Pipeline(recipe, folder).run(stage)
    with pytest.raises(KeyboardInterrupt):
        Pipeline(recipe, folder).run("correct", stop)
    assert (folder / CORRECTING).exists()
    assert run(replace(recipe, correct=CorrectSettings(pictures=97)), folder) == ["correct", "export", "evaluate"]
    assert not (folder / CORRECTING).exists()


def test_weights_are_corrected_before_they_train_and_without_training(tmp_path: Path) -> None:
    folder, recipe = tmp_path / "run", replace(quick(), correct=CorrectSettings(pictures=96))
    assert run(recipe, folder) == [*ALL[:2], "correct", *ALL[2:]]
    assert run(recipe, folder) == []
    assert "fine-tuned from model.safetensors" in read_checkpoint(folder / "export/digits.safetensors")[0].info["weights"]
    assert run(replace(recipe, correct=CorrectSettings(pictures=97)), folder) == ["correct", *ALL[2:]]
    plain = replace(recipe, finetune=None)
    assert run(plain, folder) == ["correct", "export", "evaluate"]
    assert "corrected (admm)" in read_checkpoint(folder / "export/digits.safetensors")[0].info["weights"]
    assert run(plain, folder) == []
    assert run(quick(), folder) == ALL[2:]
    with pytest.raises(NmfxError, match="correct needs a data section"):
        replace(plain, data=None)


@pytest.mark.parametrize(
    ("written", "corrects"),
    [
        ("base: digits", True),
        ("base: digits\ncorrect: false", False),
        ("base: digits\nmodel: {weights: none}", False),
        ("base: digits\nfinetune: {weights: none}", False),
        ("base: digits\nfinetune: null", True),
        ("base: digits\nsearch: {method: null, target: null, pattern: dense}", False),
        ("base: digits\nmodel: {weights: none}\ncorrect: {method: sweep}", True),  # as it was asked for
        ("base: digits\ndata: null\nfinetune: null", False),
    ],
)
def test_weights_that_mean_something_are_corrected_where_there_is_data(written: str, corrects: bool, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(written)
    assert ("correct" in Pipeline(load_recipe(path), tmp_path / "run").stages) == corrects


def test_an_output_that_is_gone_or_altered_is_made_again(tmp_path: Path) -> None:
    folder, recipe = tmp_path / "run", replace(quick(), finetune=None, data=None)
    assert run(recipe, folder) == ["build", "search", "export"]
    (folder / "export" / "scheme.yaml").unlink()
    assert Pipeline(recipe, folder).reason("export") == "export/scheme.yaml is gone"
    assert run(recipe, folder) == ["export"]
    (folder / "scheme.yaml").write_text("nmfx: scheme\n")
    assert Pipeline(recipe, folder).reason("search") == "scheme.yaml was altered"
    assert run(recipe, folder) == ["search"]  # and comes out as before
    (folder / "stages" / "export.json").write_text("{")
    assert run(recipe, folder) == ["export"]


def test_a_run_is_a_work_directory_and_scores_as_its_checkpoint(tmp_path: Path) -> None:
    folder, recipe = tmp_path / "run", quick()
    run(recipe, folder)
    work = open_work(folder)
    assert (work.model, work.weights, dict(work.kwargs)) == ("demo:digits", "pretrained", {})
    assert len(Scheme.load(work.scheme_path, work.sites(work.load()))) == 4
    model, data = load_checkpoint(work.exported_path), open_data("digits")
    assert work.exported_path == folder / "export" / "digits.safetensors"
    batches = validation_loader(data, picture_config(model, data), batch_size=256)
    scores = read_scores(folder)
    assert evaluate(model, batches) == replace(scores["exported"], agreement=None)
    assert evaluate(work.load(), batches) == scores["dense"]


@pytest.mark.parametrize(
    "search",
    [
        SearchSettings(method="domino", data=True, target=0.75, batch_size=32, loop=DominoSettings(decay=5.0, vote_every=5)),
        SearchSettings(data=True, target=0.75, method="knapsack", sensitivity="activation", pictures=64),
        SearchSettings(pattern=Pattern("2:4"), choices=Choices(keep_dense=("classifier.*",))),
        SearchSettings(limits={"params": 0.25, "macs": "2x"}, choices=Choices(m=8), method="uniform"),
    ],
    ids=["loop", "knapsack", "pattern", "limits"],
)
def test_every_kind_of_search(search: SearchSettings, tmp_path: Path) -> None:
    folder, recipe = tmp_path / "run", replace(quick(), search=search)
    pipeline = Pipeline(recipe, folder)
    pipeline.run("build")
    lines = pipeline.run("search")
    assert "sparsity" in lines[0]
    scheme = Scheme.load(folder / "scheme.yaml")
    assert scheme
    assert search.pattern is None or "classifier.weight" not in scheme
    assert not (folder / "scheme.search.safetensors").exists()
    again = replace(recipe, search=SearchSettings(scheme=str(folder / "scheme.yaml")))
    copied = Pipeline(again, tmp_path / "copy")
    copied.run("build")
    copied.run("search")
    assert dict(Scheme.load(tmp_path / "copy" / "scheme.yaml")) == dict(scheme)


def test_random_weights_kwargs_and_fixed_masks(tmp_path: Path) -> None:
    model = ModelSettings("demo:resnet20", "none", {"num_classes": 10, "in_chans": 1}, "1x8x8")
    recipe = quick(batch_size=128)
    assert recipe.finetune is not None
    recipe = replace(recipe, model=model, finetune=replace(recipe.finetune, training="fixed", weights="none"))
    folder = tmp_path / "run"
    assert run(recipe, folder) == ALL
    assert list(read_scores(folder)) == ["exported"]  # random weights have no scores
    tuned = load_checkpoint(folder / "export" / "resnet20.safetensors")
    assert tuned.fc.out_features == 10
    assert tuned(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


def test_check_goes_up_to_the_data(tmp_path: Path) -> None:
    lines = check_recipe(load_recipe("fashion-mnist"))
    assert lines[0] == (
        "build: random weights stand in: fashion-mnist-dense.nmfx/export/resnet20.baked.safetensors is not there"
    )
    assert "finetune: one update on 2 random pictures of 1x32x32: loss" in lines[-2]
    assert lines[-1].startswith("no data was used")
    lines = check_recipe(load_recipe("resnet56-cifar100-4x-macs-no-eta"))
    assert "search: domino without data stands in for the search on pictures" in lines
    recipe = quick(opt="momentun")
    with pytest.raises(NmfxError, match="timm does not accept opt 'momentun'"):
        check_recipe(recipe)
    with pytest.raises(NmfxError, match="may not come from a file"):
        check_recipe(replace(recipe, model=ModelSettings("demo:digits", "none", {"classes": 7})))


def test_what_was_trained_stays_until_it_has_been_trained_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    run(quick(), folder)
    model = folder / "finetune" / "model.safetensors"
    model.write_bytes(b"mine")
    with monkeypatch.context() as patch:
        patch.setattr("nmfx.stages.finetune.train", lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(quick(), folder)
    assert model.read_bytes() == b"mine"
    assert run(quick(), folder) == ["finetune"]  # the same bits, so that nothing after it has to run
    assert model.with_name("model.safetensors.kept").read_bytes() == b"mine"


def test_a_recipe_goes_into_a_work_directory_of_the_commands(tmp_path: Path) -> None:
    """What commands wrote there is no stage of the recipe: it is kept under another name, and nothing is lost."""
    folder = create(build(ModelSettings("demo:digits", "none")), tmp_path / "run", force=False).path
    before = (folder / "work.yaml").read_text()
    assert run(quick(), folder) == ALL
    assert (folder / "work.yaml.kept").read_text() == before
    assert run(quick(), folder) == []


def test_what_cannot_be_run(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(NmfxError, match="mine exists, and is no work directory of nmfx"):
        Pipeline(quick(), tmp_path / "mine")
    with pytest.raises(ModelError, match="comes without trained weights"):
        build_weights(ModelSettings("demo:resnet56", "pretrained"))
    built = build_weights(ModelSettings("demo:resnet56"))
    assert (built.weights, "comes without trained weights" in built.note) == ("random", True)
    folder = load_recipe("resnet50-0.80")
    with pytest.raises(NmfxError, match="say which, with --data-root DIR"):
        open_pictures(folder.data)
