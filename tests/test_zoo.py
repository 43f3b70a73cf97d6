"""Laws of the zoo: a name is a model, a model is recognised again, an example fits, and a file fits or is refused."""

from __future__ import annotations

import io
import os
import pickle
import socket
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from awkward import Residual, run, same
from safetensors.torch import save_file
from torch import Tensor, nn

from nmfx.errors import ModelError, NmfxError
from nmfx.models.building import build_model, load_weights
from nmfx.models.example import Example, example_for
from nmfx.models.source import Source, find_source, identify, identify_quickly, list_models, versions
from nmfx.passes.transform import transform

# --- names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet50", "torchvision:resnet50"),  # both have it: torchvision is asked first
        ("timm:resnet50", "timm:resnet50"),
        ("torchvision:vit_b_16", "torchvision:vit_b_16"),
        ("test_vit", "timm:test_vit"),
        ("timm:resnet50.a1_in1k", "timm:resnet50.a1_in1k"),
        ("test_vit.r160_in1k", "timm:test_vit.r160_in1k"),
        ("digits", "demo:digits"),
        ("demo:digits", "demo:digits"),
    ],
)
def test_a_name_has_one_source(name: str, expected: str) -> None:
    assert str(find_source(name)) == expected


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("resnet5O", "torchvision:resnet50"), ("torchvision:resnt18", "torchvision:resnet18"), ("tst_vit", "timm:test_vit")],
)
def test_an_unknown_name_lists_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ModelError, match=f"no model is called '{name}'.*nearest:.*{nearest}") as caught:
        find_source(name)
    assert isinstance(caught.value, NmfxError)


@pytest.mark.parametrize("name", ["", "qqqqqqqq", "torchvision:", "demo:qqqqqqqq", "../etc/passwd"])
def test_nothing_near_says_where_to_look(name: str) -> None:
    with pytest.raises(ModelError, match="no model is called"):
        find_source(name)


def test_all_names_are_known() -> None:
    names = list_models()
    assert len(names) == len(set(names)) > 1000
    assert {name.partition(":")[0] for name in names} == {"torchvision", "timm", "demo"}
    assert "demo:digits" in names


# --- examples


def test_an_example_is_what_forward_takes() -> None:
    x, y = torch.randn(3, 4), torch.randn(3, 2)
    assert Example.of(x) == Example((x,), {})
    assert Example.of((x, y)) == Example((x, y), {})
    assert Example.of({"x": x}) == Example((), {"x": x})
    assert Example.of([x, y]).args == ([x, y],)
    example = Example.of((x, y))
    assert Example.of(example) is example


@pytest.mark.parametrize(
    ("example", "batch"),
    [
        (Example((torch.zeros(3, 4),)), 3),
        (Example((), {"tokens": torch.zeros(2, 7, dtype=torch.long)}), 2),
        (Example(([torch.zeros(3, 8, 8), torch.zeros(3, 9, 9)],)), 2),
        (Example((0.5, torch.zeros(4, 2))), 4),
        (Example((torch.tensor(1.0), torch.zeros(4, 2))), 4),
        (Example(), 1),
    ],
    ids=["tensor", "keyword", "pictures", "number-first", "scalar-first", "nothing"],
)
def test_batch(example: Example, batch: int) -> None:
    assert example.batch == batch
    if batch > 1:
        assert example.doubled().batch == 2 * batch


def test_doubling_repeats_every_sample_and_nothing_else() -> None:
    x = torch.randn(2, 3)
    doubled = Example((x, 3, [x[0]]), {"scale": torch.tensor(2.0)}).doubled()
    assert torch.equal(doubled.args[0], torch.cat([x, x]))
    assert doubled.args[1] == 3
    assert same(doubled.args[2], [x[0], x[0]])
    assert doubled.kwargs["scale"].shape == ()


def test_moving_leaves_the_original_and_its_integers() -> None:
    x, tokens = torch.randn(2, 3, requires_grad=True), torch.zeros(2, dtype=torch.long)
    example = Example((x,), {"tokens": tokens, "flag": True})
    moved = example.to("meta", torch.float16)
    assert (moved.args[0].dtype, moved.args[0].is_meta, moved.args[0].requires_grad) == (torch.float16, True, False)
    assert moved.kwargs["tokens"].dtype == torch.long
    assert moved.kwargs["flag"] is True
    assert example.args[0] is x
    assert str(example) == "an input of 2x3, 2"


@pytest.mark.filterwarnings("ignore:The default weight initialization of inception_v3")
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("timm:test_vit", (1, 3, 160, 160)),
        ("torchvision:vit_b_16", (1, 3, 224, 224)),
        ("torchvision:inception_v3", (1, 3, 299, 299)),
        ("torchvision:r3d_18", (1, 3, 16, 112, 112)),
    ],
)
def test_the_models_own_configuration_gives_the_example(name: str, shape: tuple[int, ...]) -> None:
    model = find_source(name).build_meta()
    example = example_for(model)
    assert tuple(example.args[0].shape) == shape


@pytest.mark.parametrize(
    ("kwargs", "shape"),
    [({"in_chans": 1}, (1, 1, 160, 160)), ({"img_size": 96}, (1, 3, 96, 96)), ({"num_classes": 7}, (1, 3, 160, 160))],
    ids=str,
)
def test_the_example_follows_timms_arguments(kwargs: dict[str, int], shape: tuple[int, ...]) -> None:
    model = timm.create_model("test_vit", **kwargs).eval()
    example = example_for(model)
    assert tuple(example.args[0].shape) == shape
    assert model(*example.args).shape == (1, kwargs.get("num_classes", 1000))


def test_the_example_of_a_converted_model_is_the_same() -> None:
    model = timm.create_model("test_vit").eval()
    converted = transform(model, "2:4")
    assert example_for(converted).args[0].shape == example_for(model).args[0].shape


def test_an_input_size_of_the_models_own_counts() -> None:
    model = Residual()
    model.input_size = (3, 6, 6)
    assert example_for(model).args[0].shape == (1, 3, 6, 6)
    assert example_for(Residual()).args[0].shape == (1, 3, 224, 224)


# --- identities


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: torchvision.models.squeezenet1_1(), Source("torchvision", "squeezenet1_1")),
        (lambda: torchvision.models.resnet18(num_classes=7), Source("torchvision", "resnet18", {"num_classes": 7})),
        (lambda: timm.create_model("test_resnet"), Source("timm", "test_resnet")),
        (lambda: timm.create_model("test_resnet", num_classes=5), Source("timm", "test_resnet", {"num_classes": 5})),
        (
            lambda: timm.create_model("test_resnet", num_classes=5, in_chans=1),
            Source("timm", "test_resnet", {"num_classes": 5, "in_chans": 1}),
        ),
        (lambda: Source("timm", "test_vit", {"num_classes": 3}).build(), Source("timm", "test_vit", {"num_classes": 3})),
        (Residual, None),
    ],
    ids=["torchvision", "torchvision-classes", "timm", "timm-classes", "timm-channels", "built-here", "unknown"],
)
def test_a_model_is_recognised(make: Any, expected: Source | None) -> None:
    with torch.device("meta"):
        model = make()
    assert identify(model) == expected


def test_a_converted_model_is_recognised() -> None:
    for model in (torchvision.models.squeezenet1_1(), timm.create_model("test_resnet")):
        source = identify(model)
        assert source is not None
        assert identify(transform(model, "2:4")) == source


def test_a_changed_model_is_not_taken_for_the_original() -> None:
    model = Source("timm", "test_resnet").build()
    model.fc = nn.Sequential(nn.Linear(model.num_features, 8), nn.Linear(8, 2))
    assert identify(model) is None
    assert identify_quickly(model) == Source("timm", "test_resnet")  # what it says of itself


def test_a_source_survives_with_its_model() -> None:
    model = Source("timm", "test_resnet", {"num_classes": 3}).build()
    assert not model.training
    assert identify(pickle.loads(pickle.dumps(model))) == identify(model)


def test_building_on_meta_takes_no_memory() -> None:
    assert all(p.is_meta for p in Source("torchvision", "resnet18").build_meta().parameters())
    assert all(p.is_meta for p in Source("torchvision", "regnet_y_400mf").build_meta().parameters())  # reads values back


# --- weights


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No hub, no cache."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError("the network is down")

    from huggingface_hub import constants

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


REMOTE = ["torchvision:squeezenet1_1", "timm:test_resnet", "timm:test_resnet.r160_in1k"]


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", REMOTE)
def test_auto_goes_on_with_random_weights_and_says_why(name: str) -> None:
    built = build_model(name)
    assert (built.weights, str(built.source)) == ("random", name)
    assert built.note.startswith(f"pretrained weights of {name} cannot be had: ")
    assert len(built.note) < 300
    assert same(built.model.parameters(), build_model(name, weights="none").model.parameters())


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", REMOTE)
def test_pretrained_is_an_error_without_a_hub(name: str) -> None:
    with pytest.raises(ModelError, match=f"pretrained weights of {name} cannot be had: .*--weights FILE"):
        build_model(name, weights="pretrained")


@pytest.mark.usefixtures("offline")
def test_a_model_that_nobody_trained() -> None:
    assert build_model("timm:lcnet_035").weights == "random"
    with pytest.raises(ModelError, match="pretrained weights of timm:lcnet_035 cannot be had"):
        build_model("timm:lcnet_035", weights="pretrained")


def test_none_is_random_and_repeatable() -> None:
    built = build_model("test_resnet", weights="none")
    assert (built.weights, built.note) == ("random", "")
    assert not built.model.training
    state = torch.get_rng_state()
    again, other = build_model("test_resnet", weights="none"), build_model("test_resnet", weights="none", seed=1)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers are not used
    assert same(built.model.parameters(), again.model.parameters())
    assert not same(built.model.parameters(), other.model.parameters())
    assert identify(built.model) == built.source


def other_weights() -> dict[str, Tensor]:
    return build_model("test_resnet", weights="none", seed=1).model.state_dict()


WRAPPED = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state},
    "ema": lambda state: {"state_dict_ema": state},
    "parallel": lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
    "old": lambda state: {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")},
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_a_file_is_loaded(tmp_path: Path, wrap: Any, suffix: str) -> None:
    state, path = other_weights(), tmp_path / f"weights{suffix}"
    torch.save(wrap(state), path)
    built = build_model("test_resnet", weights=str(path))
    assert built.weights == "file"
    assert str(path) in built.note
    assert same(built.model.state_dict().values(), state.values())


def test_a_safetensors_file_is_loaded(tmp_path: Path) -> None:
    state, path = other_weights(), tmp_path / "weights.safetensors"
    save_file(state, path)
    assert same(build_model("test_resnet", weights=str(path)).model.state_dict().values(), state.values())


def test_a_converted_model_loads_dense_weights(tmp_path: Path) -> None:
    state, path = other_weights(), tmp_path / "weights.pth"
    torch.save(state, path)
    built = build_model("test_resnet", weights="none")
    x = torch.randn(1, 3, 32, 32)
    converted = transform(built.model, "2:4", example_input=x)
    load_weights(converted, path)
    load_weights(built.model, path)
    assert same(converted.state_dict().values(), state.values())
    example = Example((x,))
    assert same(run(converted, example), run(transform(built.model, "2:4", example_input=x), example))


def refused(path: Path, match: str) -> None:
    """Loading fails with our error, and the model keeps every weight it had."""
    model = build_model("test_resnet", weights="none").model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ModelError, match=match):
        load_weights(model, path)
    assert same(model.state_dict().values(), before.values())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.pop("layer1.0.conv1.weight"), r"layer1\.0\.conv1\.weight \(32, 32, 3, 3\) is missing"),
        (lambda s: s.update({"fc.weight": torch.zeros(3, 4)}), r"fc\.weight has shape \(3, 4\), the model expects \(1000, "),
        (lambda s: s.update({"extra.weight": torch.zeros(3)}), r"extra\.weight \(3,\) is not a weight of ResNet"),
        (lambda s: s.clear(), "is missing"),
    ],
    ids=["missing", "shape", "unknown", "empty"],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, suffix: str, change: Any, match: str) -> None:
    state, path = dict(other_weights()), tmp_path / f"weights{suffix}"
    change(state)
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    refused(path, match)


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def dump(thing: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(thing))


@pytest.mark.parametrize("save", [torch.save, dump])
def test_a_pickle_bomb_does_not_go_off(tmp_path: Path, save: Any) -> None:
    save({"conv1.weight": Bomb(tmp_path / "bang")}, tmp_path / "weights.pth")
    refused(tmp_path / "weights.pth", r"weights\.pth: cannot be read as weights")
    assert not (tmp_path / "bang").exists()


def whole_model() -> bytes:
    stream = io.BytesIO()
    torch.save(build_model("test_resnet", weights="none").model, stream)
    return stream.getvalue()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights", whole_model], ids=["empty", "text", "pickled-model"])
def test_what_is_no_weights_file_is_refused(tmp_path: Path, suffix: str, content: Any) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content() if callable(content) else content)
    refused(path, "cannot be read as weights")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_truncated_file_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    save_file(other_weights(), path) if suffix == ".safetensors" else torch.save(other_weights(), path)
    path.write_bytes(path.read_bytes()[:-1000])
    refused(path, "cannot be read as weights")


@pytest.mark.parametrize("content", [[1, 2], {"a": 3}, torch.zeros(3), {"state_dict": {"a": "b"}}], ids=str)
def test_a_file_without_a_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "weights.pth")
    refused(tmp_path / "weights.pth", "holds no state dict of tensors")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nothing.pth", r"nothing\.pth: no such file")
    refused(tmp_path / "nothing.safetensors", r"nothing\.safetensors: no such file")
    refused(tmp_path, "cannot be read as weights|no such file")


def test_versions() -> None:
    assert torch.__version__.startswith(versions()["torch"].partition("+")[0])
    assert versions().keys() == {"python", "torch", "torchvision", "timm"}
