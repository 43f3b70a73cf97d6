"""What a model expects of a picture, and of a data set's labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from timm.data import resolve_data_config
from torch import Tensor, nn

from nmfx.data.source import Data
from nmfx.errors import DataError
from nmfx.masking.owner import plain_class
from nmfx.models.example import example_for
from nmfx.models.source import identify_quickly


@dataclass(frozen=True)
class PictureConfig:
    """How pictures are brought to a model; sizes in pixels, mean and deviation by channel for pixels in 0..1.

    Attributes:
        input_size: (channels, height, width).
        crop_pct, crop_mode: which part of a validation picture is seen (timm's meaning); a set in memory is seen whole.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    crop_pct: float = 0.875
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        if len(self.input_size) != 3 or self.input_size[0] not in (1, 3) or min(self.input_size) < 1:
            raise DataError(f"input size {self.input_size}: expected (channels, height, width) with 1 or 3 channels")
        if len(self.mean) != self.input_size[0] or len(self.std) != self.input_size[0]:
            raise DataError(f"mean {self.mean} and std {self.std}: expected a number for each of {self.input_size[0]} channels")


def picture_config(
    model: nn.Module,
    data: Data,
    *,
    input_size: tuple[int, int, int] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    interpolation: str | None = None,
    crop_pct: float | None = None,
) -> PictureConfig:
    """What `model` expects, where an argument does not say otherwise.

    Args:
        model, data: which pictures are brought to which model.
        input_size: (channels, height, width); else the one the model states (``input_size``, timm's ``pretrained_cfg``,
            torchvision's), else the pictures' own.
        mean, std: by channel, for pixels in 0..1; else those of timm's ``pretrained_cfg`` or of torchvision's weights, else the
            training pictures' own for sets in memory, else ImageNet's. Those for another channel count are averaged.
        interpolation, crop_pct: how pictures are resized, and the share of a validation picture that is seen (timm's meaning).

    Returns:
        The settings of every transform of these pictures.

    Raises:
        DataError: the model does not take single pictures of 1 or 3 channels.
    """
    size = input_size or _stated_size(model) or _native_size(model, data)
    stated = _stated_settings(model, data)
    asked = {"input_size": size, "interpolation": interpolation, "crop_pct": crop_pct}
    args = {**stated, **{key: value for key, value in asked.items() if value is not None}}
    numbers = {key: args.pop(key, None) for key in ("mean", "std")}
    settings = resolve_data_config(args, pretrained_cfg=getattr(model, "pretrained_cfg", None))
    found = {key: given or numbers[key] or settings[key] for key, given in (("mean", mean), ("std", std))}
    means, deviations = (_for_channels(found[key], size[0]) for key in ("mean", "std"))
    choices = {key: settings[key] for key in ("interpolation", "crop_pct", "crop_mode")}
    return PictureConfig(size, means, deviations, **choices)


def _stated_size(model: nn.Module) -> tuple[int, int, int] | None:
    if not (hasattr(model, "input_size") or getattr(model, "pretrained_cfg", None) or _is_torchvision(model)):
        return None
    picture = next(iter(example_for(model).args), None)
    if not isinstance(picture, Tensor) or picture.dim() != 4:
        raise DataError(f"{type(model).__name__} does not take single pictures; give input_size, or use your own loader")
    channels, height, width = picture.shape[1:]
    return channels, height, width


def _native_size(model: nn.Module, data: Data) -> tuple[int, int, int]:
    channels, height, width = data.shape or (3, 224, 224)
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return (channels if first is None else first.in_channels), height, width


def _is_torchvision(model: nn.Module) -> bool:
    return plain_class(model).__module__.startswith("torchvision.models")


def _stated_settings(model: nn.Module, data: Data) -> dict[str, Any]:
    """Mean, deviation and resizing where timm's pretrained_cfg is silent: torchvision's weights, or the data's own numbers."""
    if (source := identify_quickly(model)) and source.library == "torchvision":
        import torchvision

        preset = torchvision.models.get_model_weights(source.name).DEFAULT.transforms()
        if hasattr(preset, "crop_size") and hasattr(preset, "resize_size"):
            share = preset.crop_size[0] / (preset.resize_size[0] + 0.5)  # timm rounds size / share down
            resizing = {"interpolation": preset.interpolation.value, "crop_pct": share}
            return {"mean": tuple(preset.mean), "std": tuple(preset.std), **resizing}
    if _is_torchvision(model):
        return {"interpolation": "bilinear"}
    if not getattr(model, "pretrained_cfg", None) and data.mean:
        return {"mean": data.mean, "std": data.std}
    return {}


def _for_channels(numbers: tuple[float, ...], channels: int) -> tuple[float, ...]:
    numbers = tuple(numbers)
    return numbers if len(numbers) == channels else (sum(numbers) / len(numbers),) * channels


def check_classes(data: Data, model: nn.Module) -> None:
    """Check that the model has one output a class; data that does not say how many it has passes.

    Raises:
        DataError: the counts differ.
    """
    outputs = _outputs(model)
    if not data.classes or outputs is None or outputs == data.classes:
        return
    raise DataError(
        f"{data.name} has {data.classes} classes, {type(model).__name__} has {outputs} outputs; build the model with "
        f"--classes {data.classes} (num_classes={data.classes} in Python), or take the data set it was made for"
    )


def _outputs(model: nn.Module) -> int | None:
    stated = getattr(model, "num_classes", None)
    if isinstance(stated, int):
        return stated
    heads = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    if not heads:
        return None
    return heads[-1].out_features if isinstance(heads[-1], nn.Linear) else heads[-1].out_channels
