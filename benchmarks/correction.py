"""Accuracy without labels: python benchmarks/correction.py --data DIR [--only NAME] [--targets 0.5] [--minutes 10] [--out FILE]

DIR holds `cifar10/` (JPEG pictures, train/ and test/), `imagenet500/` and `resnet20-cifar10.safetensors`,
`resnet56-cifar10.safetensors`. Schemes are data-free knapsacks over N:16, or 2:4 everywhere (`uniform`). Fitted on training
pictures without their labels (512 of CIFAR-10; every second class of the 500 of ImageNet), reported on others (2,000; the other
half). Columns: dense, masked with batch norms matched, corrected by each method, and with --minutes corrected by the first
method and then distilled for so long, as `nmfx compress` does.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import numpy as np
import timm.data
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import nmfx
from nmfx.data.config import PictureConfig
from nmfx.data.folder import open_unlabelled
from nmfx.data.pictures import ArrayPictures
from nmfx.data.sample import few_pictures
from nmfx.data.source import Data
from nmfx.settings.stages import DISTILLATION
from nmfx.sparsity.correction import CORRECTIONS
from nmfx.training.masks import set_training
from nmfx.training.trainer import epochs_within

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
Pictures = tuple[Tensor, Tensor]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters: every second pixel, channels padded on both sides."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.stride = out // width
        self.conv1, self.bn1 = nn.Conv2d(width, out, 3, self.stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            side = x.shape[1] // 2
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, side, side))
        return F.relu(y + x)


class Published(nn.Module):
    """The CIFAR ResNets whose weights are published."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        stages = ((16, 16), (16, 32), (32, 64))
        for number, (width, out) in enumerate(stages, 1):
            stage = nn.Sequential(Block(width, out), *(Block(out, out) for _ in range(blocks - 1)))
            setattr(self, f"layer{number}", stage)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def published(data: Path, depth: int) -> nn.Module:
    model = Published((depth - 2) // 6)
    model.load_state_dict(load_file(data / f"resnet{depth}-cifar10.safetensors"), strict=False)
    return model.eval()


def cifar(data: Path, split: str, count: int) -> Pictures:
    """The same number of pictures of every class, shuffled."""
    draw, pictures, labels = np.random.default_rng(0), [], []
    for label, folder in enumerate(sorted((data / "cifar10" / split).iterdir())):
        files = sorted(folder.iterdir())
        for index in draw.permutation(len(files))[: count // 10 + (label < count % 10)]:
            pictures.append(np.asarray(Image.open(files[index]).convert("RGB")))
            labels.append(label)
    x = torch.from_numpy(np.stack(pictures)).movedim(3, 1).float() / 255
    x = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    order = torch.from_numpy(draw.permutation(len(labels)))
    return x[order], torch.tensor(labels)[order]


def imagenet(data: Path) -> tuple[Pictures, Pictures]:
    """Every second class to fit on, the others to report on."""
    names = (Path(timm.data.__file__).parent / "_info" / "imagenet_synsets.txt").read_text().split()
    see = timm.data.create_transform((3, 224, 224), interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.875)
    halves = []
    for half in range(2):
        folders = sorted((data / "imagenet500").iterdir())[half::2]
        files = [(file, names.index(folder.name)) for folder in folders for file in sorted(folder.iterdir())]
        x = torch.stack([see(Image.open(file).convert("RGB")) for file, _ in files])
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))
        halves.append((x[order], torch.tensor([label for _, label in files])[order]))
    return halves[0], halves[1]


def few(name: str, data: Path, fit: Pictures) -> tuple[Data, PictureConfig]:
    """The pictures to fit on, as training reads and alters them, an eighth of them held back."""
    if name == "lite0":
        everything = open_unlabelled(data / "imagenet500")
        halves = {folder.name for folder in sorted((data / "imagenet500").iterdir())[::2]}
        own = [Path(file).parent.name in halves for file, _ in everything.source.samples]
        pictures = everything.part(torch.tensor(own).nonzero().flatten())
        config = PictureConfig((3, 224, 224), (0.5,) * 3, (0.5,) * 3, "bicubic", 0.875)
        return few_pictures(Data(name, 1, (), pictures, pictures), None, hold_back=True), config
    pixels = fit[0] * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    array = ArrayPictures((pixels * 255).round().to(torch.uint8), fit[1], hflip=0.5)
    return few_pictures(Data(name, 10, (), array, array), None, hold_back=True), PictureConfig((3, 32, 32), MEAN, STD)


def distil(masked: nn.Module, dense: nn.Module, data: Data, config: PictureConfig, minutes: float) -> int:
    """As `nmfx finetune --distill-only`; the number of epochs that fitted."""
    set_training(masked, DISTILLATION.training)
    epochs = epochs_within(60 * minutes, masked, data, DISTILLATION.settings, config, dense)
    settings = dataclasses.replace(DISTILLATION.settings, epochs=epochs).at_rate_of(len(data.train))
    nmfx.finetune(masked, data, settings=settings, config=config, teacher=dense)
    return epochs


@torch.no_grad()
def accuracy(model: nn.Module, pictures: Pictures) -> float:
    """Top-1, percent."""
    parts = zip(pictures[0].split(100), pictures[1].split(100), strict=True)
    return 100 * sum(int((model(x).argmax(1) == y).sum()) for x, y in parts) / len(pictures[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", default="resnet20,resnet56,lite0")
    parser.add_argument("--targets", default="0.5,0.75,0.875,uniform")
    parser.add_argument("--methods", default=",".join(CORRECTIONS))
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    for name in args.only.split(","):
        if name == "lite0":
            from pictures import lite0

            model, (fit, report) = lite0(), imagenet(args.data)
        else:
            model = published(args.data, int(name.removeprefix("resnet")))
            fit, report = cifar(args.data, "train", 512), cifar(args.data, "test", 2000)
        batches = list(fit[0].split(32))
        sites = nmfx.find_sites(model, batches[0][:1])
        dense = accuracy(model, report)
        for target in args.targets.split(","):
            scheme = "2:4" if target == "uniform" else nmfx.find_scheme(model, target=float(target), sites=sites).scheme
            masked = nmfx.transform(model, scheme, sites=sites)
            nmfx.recalibrate_bn(masked, batches, dense=model)
            record = {"network": name, "target": target, "dense": dense, "recalibrated": accuracy(masked, report)}
            for method in args.methods.split(","):
                masked, start = nmfx.transform(model, scheme, sites=sites), time.monotonic()
                nmfx.correct(masked, batches, method=method)
                record |= {method: accuracy(masked, report), f"{method} seconds": round(time.monotonic() - start, 1)}
                if args.minutes and method == args.methods.split(",")[0]:
                    start = time.monotonic()
                    record["epochs"] = distil(masked, model, *few(name, args.data, fit), args.minutes)
                    record |= {"distilled": accuracy(masked, report), "minutes": round((time.monotonic() - start) / 60, 1)}
            print(json.dumps(record), flush=True)
            if args.out:
                with args.out.open("a") as file:
                    file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
