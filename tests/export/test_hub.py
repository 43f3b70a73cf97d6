"""A folder for model hubs: timm loads it, nmfx loads it, its card has no figure that was not measured of its weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nmfx import bake, load_checkpoint, scheme_of, verify
from nmfx.errors import CheckpointError
from nmfx.export.hub import NAMES
from nmfx.models.building import build_model

SMALL = ("timm:test_resnet", "--weights", "none", "--classes", "3", "--input-size", "3x32x32", "--pattern", "2:4")
Run = Callable[..., str]


def same(one: nn.Module, other: nn.Module, x: Tensor) -> bool:
    with torch.no_grad():
        return torch.equal(one.eval()(x), other.eval()(x))


@pytest.fixture
def hub(nmfx: Run) -> Path:
    nmfx("convert", *SMALL)
    out = nmfx("export", "--folder")
    folder = Path("test_resnet.nmfx/export/hub")
    assert sorted(path.name for path in folder.iterdir()) == sorted(NAMES)
    for name in NAMES:
        assert f"wrote {folder / name} (" in out
    return folder


def test_timm_loads_it_as_it_loads_any_folder(hub: Path) -> None:
    model = timm.create_model(f"local-dir:{hub}", pretrained=True)
    assert model.num_classes == 3
    assert tuple(model.pretrained_cfg["input_size"]) == (3, 32, 32)
    wanted = load_checkpoint(hub.parent / "test_resnet.safetensors")
    assert same(model, wanted, torch.rand(2, 3, 32, 32))
    zeros = sum(int((p == 0).sum()) for p in model.parameters())
    assert zeros == sum(int((p == 0).sum()) for p in bake(wanted).parameters()) > 0


def test_nmfx_loads_it_masked(hub: Path) -> None:
    wanted, found = load_checkpoint(hub.parent / "test_resnet.safetensors"), load_checkpoint(hub)
    assert same(found, wanted, torch.rand(2, 3, 32, 32))
    assert scheme_of(found).patterns == scheme_of(wanted).patterns
    verify(found)
    given = build_model("timm:test_resnet", weights="none", seed=7, kwargs={"num_classes": 3}).model
    assert load_checkpoint(hub, given) is given
    assert same(given, wanted, torch.rand(2, 3, 32, 32))
    assert same(load_checkpoint(hub, given), wanted, torch.rand(2, 3, 32, 32)), "into a masked one as well"


def test_a_card_has_no_figure_that_was_not_measured(hub: Path, nmfx: Run) -> None:
    card = (hub / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "timm"
    assert "base_model" not in head, "random weights are of no base model"
    assert "license" not in head
    assert "No accuracy of these weights was recorded" in card
    assert "top-1" not in card
    assert 'timm.create_model("local-dir:FOLDER", pretrained=True)' in card


def test_measured_accuracies_come_from_the_work_directory(nmfx: Run) -> None:
    nmfx("convert", "digits", "--pattern", "4:16")
    nmfx("correct", "--data", "digits", "--pictures", "96")
    out = nmfx("evaluate", "--data", "digits")
    found = {one["label"]: one for one in json.loads(Path("digits.nmfx/measured.json").read_text())}
    assert found.keys() == {"dense", "masked, untrained", "corrected"}
    nmfx("export", "--folder")
    card = Path("digits.nmfx/export/hub/README.md").read_text()
    for label, here in (("dense", "dense"), ("corrected", "here")):
        row = f"| {here} | {found[label]['top1']:.2%} | {found[label]['top5']:.2%} | 599 validation pictures of digits |"
        assert row in card
        assert f"{found[label]['top1']:.2%}" in out
    model = load_checkpoint("digits.nmfx/export/hub")
    assert same(model, load_checkpoint("digits.nmfx/export/digits.safetensors"), torch.rand(2, 1, 8, 8))
    assert f"{found['corrected']['top1']:.2%}" in nmfx("evaluate", "digits.nmfx/export/hub", "--data", "digits")
    assert json.loads(nmfx("inspect", "digits.nmfx/export/hub", "--json"))["patterns"]["classifier.weight"] == "4:16"
    out = nmfx("bench", "digits.nmfx/export/hub", "--batch", "1", "--threads", "1", "--turns", "1", "--engines", "none")
    assert "of 6 sites are computed by the sparse kernel" in out
    nmfx("correct", "--data", "digits", "--pictures", "64", "--force")
    nmfx("export", "--folder", "--force")
    card = Path("digits.nmfx/export/hub/README.md").read_text()
    assert "| dense |" in card
    assert "| here |" not in card.partition("## Measured")[2], "other weights were exported than were evaluated"
    assert "No accuracy of these weights was recorded" in card
    Path("digits.nmfx/corrected/model.safetensors").unlink()
    nmfx("export", "--folder", "--force")
    card = Path("digits.nmfx/export/hub/README.md").read_text()
    assert f"| here | {found['masked, untrained']['top1']:.2%} |" in card


def test_a_recipe_writes_it_and_goes_on(nmfx: Run) -> None:
    recipe = "model: {name: digits}\nsearch: {pattern: 2:4}\ndata: {name: digits}\nexport: {folder: true}\n"
    Path("mine.yaml").write_text(recipe)
    nmfx("run", "mine.yaml")
    card = Path("mine.nmfx/export/hub/README.md")
    assert "No accuracy of these weights" in card.read_text()
    assert nmfx("run", "mine.yaml").count("skipped") == 5
    nmfx("export", "mine.nmfx", "--folder", "--force")
    assert card.read_text().count("599 validation pictures of digits") == 2
    Path("mine.yaml").write_text(recipe.replace("true", "false"))
    nmfx("run", "mine.yaml")
    assert not Path("mine.nmfx/export/hub/config.json").exists() or "kept" in "".join(map(str, Path("mine.nmfx").rglob("*")))


def test_force_replaces_a_directory_with_one(hub: Path, nmfx: Run) -> None:
    nmfx("convert", *SMALL, "--force")
    assert not hub.exists()


def alter(hub: Path, **entry: object) -> None:
    config = json.loads((hub / "config.json").read_text())
    config["nmfx"] |= entry
    (hub / "config.json").write_text(json.dumps(config))


def test_what_is_damaged_is_named(hub: Path, nmfx: Run) -> None:
    weights = load_file(hub / "model.safetensors")
    dense = {**weights, "fc.weight": torch.rand_like(weights["fc.weight"]) + 1}
    save_file(dense, hub / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"fc\.weight has more weights that are not zero than 2:4 of scheme\.yaml keeps"):
        load_checkpoint(hub)
    save_file({name: tensor for name, tensor in weights.items() if name != "fc.bias"}, hub / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"fc\.bias .* is missing"):
        load_checkpoint(hub)
    (hub / "model.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read as weights"):
        load_checkpoint(hub)
    save_file(weights, hub / "model.safetensors")
    for entry, error in [
        ({"version": 2}, "version 2, this nmfx reads version 1"),
        ({"kwargs": {"checkpoint_path": "/etc/passwd"}}, "checkpoint_path"),
        ({"model": "timm:no_such"}, "cannot be built here: no model is called"),
        ({"code": "x"}, "code"),
    ]:
        before = (hub / "config.json").read_text()
        alter(hub, **entry)
        with pytest.raises(CheckpointError, match=error):
            load_checkpoint(hub)
        (hub / "config.json").write_text(before)
    (hub / "config.json").write_text('{"architecture": "resnet18"}')
    with pytest.raises(CheckpointError, match="has no entry 'nmfx', so nmfx did not write it"):
        load_checkpoint(hub)
    (hub / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_checkpoint(hub)


def test_a_model_of_another_library_is_loaded_by_nmfx(nmfx: Run) -> None:
    nmfx("convert", "torchvision:mnasnet0_5", "--weights", "none", "--input-size", "32", "--classes", "4", "--pattern", "2:4")
    nmfx("export", "--folder")
    config = json.loads(Path("mnasnet0_5.nmfx/export/hub/config.json").read_text())
    assert (config["library"], config["architecture"]) == ("torchvision", "mnasnet0_5")
    wanted = load_checkpoint("mnasnet0_5.nmfx/export/mnasnet0_5.safetensors")
    assert same(load_checkpoint("mnasnet0_5.nmfx/export/hub"), wanted, torch.rand(2, 3, 32, 32))
    assert "timm" not in Path("mnasnet0_5.nmfx/export/hub/README.md").read_text().partition("versions")[0].split("- python")[0]


def test_existing_folders_are_not_overwritten(hub: Path, nmfx: Run) -> None:
    assert "exists already; give --force" in nmfx("export", "--folder", fails=True)
