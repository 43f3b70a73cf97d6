"""The residual networks of CIFAR shape (He et al., 2016): 6n + 2 layers of 16, 32 and 64 channels."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, a 1x1 convolution where the width changes."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or width != out:
            self.shortcut = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, width, h, w)`` to ``(batch, out, h / stride, w / stride)``."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class CifarResNet(nn.Module):
    """Three stages of `blocks` blocks; ResNet-56 at 32x32 has 0.86 M weights and 126 M MACs (`blocks` = 9, 100 classes)."""

    def __init__(self, blocks: int, *, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        self.blocks, self.num_classes, self.input_size = blocks, num_classes, (in_chans, 32, 32)
        self.conv1, self.bn1 = nn.Conv2d(in_chans, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        """Pictures ``(batch, in_chans, h, w)`` to logits ``(batch, num_classes)``."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))  # batch 64 h/4 w/4
        return self.fc(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


def _stage(width: int, out: int, blocks: int, *, stride: int) -> nn.Sequential:
    first = {"0": Block(width, out, stride)}
    return nn.Sequential(OrderedDict(first | {str(i): Block(out, out, 1) for i in range(1, blocks)}))


def load_resnet(depth: int, *, trained: bool = False, num_classes: int = 10, in_chans: int = 3) -> CifarResNet:
    """The network of `depth` = 6n + 2 layers, with random weights.

    Raises:
        ValueError: trained weights are asked for; there are none.
    """
    if trained:
        raise ValueError(f"demo:resnet{depth} comes without trained weights; train it, or give a file")
    return CifarResNet((depth - 2) // 6, num_classes=num_classes, in_chans=in_chans)
