"""Labelled pictures for training, search and evaluation, on timm's data sets, transforms and mixup."""

from nmfx.data.config import PictureConfig, check_classes, picture_config
from nmfx.data.loader import PictureLoader, TrainLoader, train_loader, validation_loader
from nmfx.data.sample import calibration
from nmfx.data.source import Data, open_data
from nmfx.settings.training import Augment

__all__ = [
    "Augment",
    "Data",
    "PictureConfig",
    "PictureLoader",
    "TrainLoader",
    "calibration",
    "check_classes",
    "open_data",
    "picture_config",
    "train_loader",
    "validation_loader",
]
