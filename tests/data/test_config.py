"""What models expect of pictures and labels."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import nn

from nmfx.data.config import PictureConfig, check_classes, picture_config
from nmfx.data.loader import train_loader, validation_loader
from nmfx.data.source import Data, open_data
from nmfx.demo.digits import DigitsNet
from nmfx.errors import DataError
from nmfx.models.building import build_model


@pytest.fixture(scope="module")
def digits() -> Data:
    return open_data("digits")


def test_timms_configuration(digits: Data) -> None:
    model = timm.create_model("tf_efficientnet_lite0")
    config = picture_config(model, digits)
    assert config.input_size == (3, 224, 224)
    assert config.mean == config.std == (0.5, 0.5, 0.5)
    assert config.interpolation == "bicubic"
    grey = picture_config(timm.create_model("resnet18", in_chans=1), digits)
    assert grey.input_size == (1, 224, 224)
    assert grey.mean == pytest.approx(((0.485 + 0.456 + 0.406) / 3,))
    small = picture_config(timm.create_model("vit_tiny_patch16_224", img_size=32), digits)
    assert small.input_size == (3, 32, 32)


def test_torchvisions_weights_say_how_they_were_evaluated(digits: Data) -> None:
    config = picture_config(build_model("torchvision:resnet50", weights="none").model, digits)
    assert config.input_size == (3, 224, 224)
    assert int(224 / config.crop_pct) == 232
    assert config.interpolation == "bilinear"
    assert config.mean == (0.485, 0.456, 0.406)
    assert picture_config(torchvision.models.resnet18(), digits).input_size == (3, 224, 224)


def test_own_models_get_the_native_size_and_the_datas_own_numbers(digits: Data) -> None:
    config = picture_config(DigitsNet(), digits)
    assert config == PictureConfig((1, 8, 8), digits.mean, digits.std, "bicubic", config.crop_pct)
    own = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 10))
    config = picture_config(own, digits)
    assert config.input_size == (3, 8, 8)
    assert config.mean == digits.mean * 3
    x, _ = next(iter(train_loader(digits, config, batch_size=4)))
    assert own(x).shape == (4, 10)


def test_what_is_given_goes_first(digits: Data) -> None:
    model = timm.create_model("resnet18")
    config = picture_config(model, digits, input_size=(3, 64, 48), mean=(0.1,), std=(0.2, 0.3, 0.4), interpolation="bilinear")
    assert config == PictureConfig((3, 64, 48), (0.1,) * 3, (0.2, 0.3, 0.4), "bilinear", config.crop_pct)
    (x, _), *_ = validation_loader(digits, config, batch_size=2)
    assert x.shape == (2, 3, 64, 48)
    levels = x * torch.tensor(config.std).view(-1, 1, 1) + 0.1
    assert -1e-6 <= levels.min() <= levels.max() <= 1 + 1e-6


def test_models_without_single_pictures(digits: Data) -> None:
    with pytest.raises(DataError, match="does not take single pictures"):
        picture_config(torchvision.models.video.r3d_18(), digits)
    with pytest.raises(DataError, match="1 or 3 channels"):
        picture_config(nn.Conv2d(5, 4, 3), digits)


def test_label_counts(digits: Data) -> None:
    check_classes(digits, DigitsNet())
    check_classes(digits, timm.create_model("resnet18", num_classes=10))
    for model in (timm.create_model("resnet18"), torchvision.models.squeezenet1_1()):
        with pytest.raises(DataError, match=r"digits has 10 classes, .* has 1000 outputs; build the model with --classes 10"):
            check_classes(digits, model)
