"""The main road on the lowest versions that pyproject.toml admits: `make oldest` runs it."""

from __future__ import annotations

import io
import pickle
import re
import sys
from importlib.metadata import version
from pathlib import Path

import folders
import pytest
import timm
import torch
import torchvision

import nmfx
from nmfx.cli.main import main
from nmfx.data.config import PictureConfig

ROOT = Path(__file__).parents[1]
MODELS = {
    "timm:test_resnet": lambda: timm.create_model("test_resnet", num_classes=3),
    "timm:test_vit": lambda: timm.create_model("test_vit", num_classes=3, img_size=32),
    "torchvision:mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=3),
}


def test_these_are_the_lowest_versions() -> None:
    block = re.search(r"^dependencies = \[.*?^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    assert block
    lowest = dict(re.findall(r'"([a-z]+)>=([0-9.]+)"', block[0]))
    installed = {name: version(name) for name in lowest}
    print(f"\nPython {sys.version.split()[0]}, {', '.join(f'{name} {one}' for name, one in installed.items())}")
    assert len(lowest) == 9
    for name, least in lowest.items():
        assert re.fullmatch(rf"{re.escape(least)}(\.0)*(\+cpu)?", installed[name]), name
    assert sys.version_info[:2] == (3, 10)


@pytest.mark.parametrize("name", MODELS)
def test_the_main_road(name: str, tmp_path: Path) -> None:
    model, x = MODELS[name]().eval(), torch.rand(2, 3, 32, 32)
    data = nmfx.open_data(str(folders.make_split(tmp_path / "data", train=4, validation=2)))
    result = nmfx.find_scheme(model, target=0.5, example_input=x)
    masked = nmfx.transform(model, result.scheme, example_input=x)
    assert list(masked.state_dict()) == list(model.state_dict())
    config = PictureConfig((3, 32, 32), (0.5,) * 3, (0.5,) * 3)
    nmfx.finetune(masked, data, settings=nmfx.Settings(epochs=1, batch_size=6), config=config, folder=tmp_path / "run")
    assert nmfx.verify(masked).sites == len(result.scheme)
    nmfx.save_checkpoint(masked, tmp_path / "x.safetensors")
    loaded = nmfx.load_checkpoint(tmp_path / "x.safetensors", MODELS[name]()).eval()
    with torch.no_grad():
        expected = masked.eval()(x)
        assert torch.equal(loaded(x), expected)
        assert torch.allclose(nmfx.bake(masked)(x), expected, atol=1e-5)
        assert torch.allclose(nmfx.compile(masked, x)(x), expected, atol=1e-3)


def test_the_published_search() -> None:
    model, x = timm.create_model("test_resnet", num_classes=3), torch.rand(4, 3, 32, 32)
    search = nmfx.DominoSearch(model, 0.5, example_input=x, decay=5.0, vote_every=2)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    while not search.done:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 0])).backward()
        search.step()
        optimizer.step()
    assert search.scheme


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (["convert", "digits"], ["search", "--target", "0.75"], ["export", "--baked"], ["inspect", "digits.nmfx"]):
        assert main(command) == 0, capsys.readouterr().err
    assert (tmp_path / "digits.nmfx" / "export" / "digits.safetensors").is_file()


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("import builtins; builtins.was_run = True",))


@pytest.mark.parametrize("where", ["checkpoint_path", "pretrained_cfg"])
def test_timm_does_not_unpickle(where: str, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"state_dict": Evil()}, buffer)
    for content in (buffer.getvalue(), pickle.dumps(Evil())):
        (tmp_path / "evil.pth").write_bytes(content)
        file = str(tmp_path / "evil.pth")
        options = (
            {"checkpoint_path": file} if where == "checkpoint_path" else {"pretrained": True, "pretrained_cfg": {"file": file}}
        )
        with pytest.raises(Exception, match=r"(?i)weights.only"):
            timm.create_model("test_resnet", **options)
        assert not hasattr(__import__("builtins"), "was_run")
