"""What a file may ask a builder for: an allow-list, within bounds, compared with what is stored before memory is taken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
import yaml
from mutations import HOSTILE
from torch import nn

from nmfx.errors import CheckpointError, ModelError, NmfxError
from nmfx.export.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from nmfx.files.sealed import read_sealed, write_sealed
from nmfx.models import building
from nmfx.models.arguments import ARGUMENTS, parse_kwargs
from nmfx.models.building import Built, build_model, build_stored
from nmfx.models.source import Source
from nmfx.recipe.loader import load_recipe
from nmfx.stages.build import create, examine
from nmfx.stages.work import open_work

NEVER = (
    *("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "pretrained", "features_only", "weights"),
    *("weights_backbone", "progress", "quantize", "block", "layers", "embed_dim", "depth", "depths", "num_heads", "stem_width"),
    *("", "__class__", "hf-hub:a/b"),
)


@pytest.mark.parametrize("name", NEVER)
def test_what_is_not_on_the_list_is_refused_by_name(name: str) -> None:
    with pytest.raises(ModelError, match=r"work\.yaml: kwargs: .* may not come from a file") as caught:
        parse_kwargs({"num_classes": 3, name: 1}, "work.yaml")
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_value_is_within_its_bounds_or_refused(name: str) -> None:
    for value in HOSTILE:
        try:
            found = parse_kwargs({name: value}, "work.yaml")[name]
        except ModelError as error:
            assert str(error).startswith(f"work.yaml: kwargs.{name}")  # noqa: PT017 - any other exception fails
            continue
        numbers = np.ravel(found) if isinstance(found, tuple | int | float) else ()
        assert all(0 <= number <= 1_000_000 for number in numbers), value
        assert not isinstance(found, str) or len(found) <= 32


GOOD = {
    "num_classes": 10,
    "in_chans": 1,
    "img_size": [64, 32],
    "patch_size": 16,
    "drop_rate": 0,
    "global_pool": "",
    "qkv_bias": True,
}


def test_what_users_need_is_allowed() -> None:
    assert parse_kwargs(GOOD, "here") == {**GOOD, "img_size": (64, 32)}
    assert parse_kwargs({"num_classes": 0, "init_values": None, "aux_logits": False}, "here")["init_values"] is None


# Files that ask for more.


def rewrite(path: Path, **source: Any) -> None:
    """The same checkpoint, of another source, under a digest that is right."""
    content, tensors = read_sealed(path, "a checkpoint", 1)
    write_sealed(path, content | {"source": {**content["source"], **source}}, tensors)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("small") / "vit.safetensors"
    save_checkpoint(build_model("timm:test_vit", weights="none", kwargs={"num_classes": 3, "img_size": 64}).model, path)
    return path.read_bytes()


SOURCES: dict[str, tuple[dict[str, Any], str]] = {
    "a pickle": ({"kwargs": {"checkpoint_path": "/tmp/x.pth"}}, "'checkpoint_path' may not come from a file"),
    "a pickle of a configuration": ({"kwargs": {"pretrained_cfg": {"file": "/tmp/x"}}}, "'pretrained_cfg' may not"),
    "a hub": ({"name": "hf-hub:timm/resnet18"}, "source.name"),
    "a folder": ({"name": "local-dir:/tmp/x"}, "source.name"),
    "a path": ({"name": "../../x"}, "source.name"),
    "a library": ({"library": "os"}, "source.library"),
    "three billion classes": ({"kwargs": {"num_classes": 3_000_000_000}}, "kwargs.num_classes: Expected `int` <= 1000000"),
    "a million classes": (
        {"kwargs": {"num_classes": 1_000_000, "img_size": 64}},
        r"made for 3 classes, VisionTransformer is built with 1000000",
    ),
    "a large picture": ({"kwargs": {"num_classes": 3, "img_size": 8192}}, "pos_embed has shape"),
    "another model": ({"name": "test_vit2"}, "is missing|has shape|is not a weight"),
    "a larger model": ({"name": "vit_giant_patch14_224"}, "is missing|has shape"),
    "no model": ({"name": "resnet_of_mine"}, "no model is called"),
    "what it does not take": ({"kwargs": {"num_classes": 3, "img_size": 64, "width_mult": 2}}, "cannot be built"),
    "no mapping": ({"kwargs": [1]}, "source.kwargs: Expected `object`"),
}


@pytest.mark.parametrize("case", SOURCES)
def test_a_checkpoint_is_not_built_on_its_word(
    case: str, small: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, message = SOURCES[case]
    path = tmp_path / "vit.safetensors"
    path.write_bytes(small)
    rewrite(path, **source)
    monkeypatch.setattr(building, "build_random", lambda *args: pytest.fail("built before it was compared"))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)


def test_tables_that_no_state_dict_has_are_counted() -> None:
    source = Source("timm", "swin_tiny_patch4_window7_224", {"img_size": 8192, "window_size": 32})
    shapes = {name: tuple(value.shape) for name, value in source.build_meta().state_dict().items()}
    with pytest.raises(ModelError, match=r"here: timm:swin_tiny.* needs [\d,]+ bytes; build it yourself"):
        build_stored(source, shapes, "here")


@pytest.mark.parametrize("kwargs", ['{"checkpoint_path": "x"}', '{"num_classes": 3000000000}', "[1]", "3", "{", '{"a": NaN}'])
def test_a_work_directory_is_not_built_on_its_word(kwargs: str, tmp_path: Path) -> None:
    head = {"nmfx": "work", "version": 1, "model": "timm:test_vit", "kwargs": kwargs, "weights": "random"}
    (tmp_path / "work.yaml").write_text(yaml.safe_dump(head))
    with pytest.raises(NmfxError, match=r"work\.yaml: .*kwargs"):
        open_work(tmp_path)


@pytest.mark.parametrize("model", ["timm:hf-hub:timm/resnet18", "hf-hub:me/resnet18", "timm:local-dir:/tmp", "/tmp/x", ""])
def test_a_work_directory_names_a_model_of_a_registry(model: str, tmp_path: Path) -> None:
    (tmp_path / "work.yaml").write_text(yaml.safe_dump({"nmfx": "work", "version": 1, "model": model, "weights": "random"}))
    with pytest.raises(NmfxError, match=r"work\.yaml: no model is called"):
        open_work(tmp_path)


def test_random_weights_are_not_taken_on_a_files_word(tmp_path: Path) -> None:
    head = {"nmfx": "work", "version": 1, "model": "torchvision:vgg11", "weights": "random"}
    (tmp_path / "work.yaml").write_text(yaml.safe_dump(head | {"kwargs": json.dumps({"num_classes": 1_000_000})}))
    with pytest.raises(ModelError, match=r"work\.yaml: torchvision:vgg11 with .* needs [\d,]+ bytes"):
        open_work(tmp_path).load()


@pytest.mark.parametrize(
    "kwargs", ["{checkpoint_path: x}", "{num_classes: 3e9}", "{pretrained_cfg: {file: x}}", "{drop_rate: -1}"]
)
def test_a_recipe_may_not_either(kwargs: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"model: {{name: timm:test_vit, kwargs: {kwargs}}}\nsearch: {{target: 0.5}}\n")
    with pytest.raises(NmfxError, match=r"mine\.yaml: model: .*kwargs"):
        load_recipe(path)


# What a person built, written to a file.


def test_allowed_arguments_come_back(small: bytes, tmp_path: Path) -> None:
    (tmp_path / "vit.safetensors").write_bytes(small)
    loaded = load_checkpoint(tmp_path / "vit.safetensors")
    assert (loaded.num_classes, loaded.patch_embed.img_size) == (3, (64, 64))


def test_other_arguments_are_saved_without_a_source(tmp_path: Path) -> None:
    model = build_model("timm:test_vit", weights="none", kwargs={"embed_dim": 32, "num_heads": 2}).model
    save_checkpoint(model, tmp_path / "vit.safetensors")
    assert read_checkpoint(tmp_path / "vit.safetensors")[0].source is None
    with pytest.raises(CheckpointError, match=r"built with arguments that no file may give; build it and call load_checkpoint"):
        load_checkpoint(tmp_path / "vit.safetensors")
    again = build_model("timm:test_vit", weights="none", kwargs={"embed_dim": 32, "num_heads": 2}, seed=1).model
    load_checkpoint(tmp_path / "vit.safetensors", again)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_work_directory_is_not_written_that_could_not_be_read(tmp_path: Path) -> None:
    kwargs = {"embed_dim": 32, "num_heads": 2}
    built = build_model("timm:test_vit", weights="none", kwargs=kwargs)
    record = examine(Built(built.model, built.source, "random"), None)
    with pytest.raises(NmfxError, match="'embed_dim' may not come from a file"):
        create(record, tmp_path / "vit.nmfx", force=False)
    assert list(tmp_path.iterdir()) == []


MODELS: dict[str, Callable[[], nn.Module]] = {
    "regnet": lambda: torchvision.models.regnet_y_400mf(),
    "vit": lambda: timm.create_model("test_vit"),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_random_state_stays_as_it_is(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    before = torch.random.get_rng_state()
    save_checkpoint(model, tmp_path / "model.safetensors")
    assert torch.equal(torch.random.get_rng_state(), before)
    if read_checkpoint(tmp_path / "model.safetensors")[0].source is not None:
        load_checkpoint(tmp_path / "model.safetensors")
    assert torch.equal(torch.random.get_rng_state(), before)
