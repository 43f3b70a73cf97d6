"""DigitsNet: a small CNN for the 1,797 handwritten digits of scikit-learn, with trained weights in the package."""

from __future__ import annotations

from collections import OrderedDict
from importlib import resources

import torch
from safetensors.torch import load
from torch import Tensor, nn

from nmfx.errors import NmfxError

WEIGHTS = "digits.safetensors"  # made by examples/train_demo.py; its header says how


def _block(width_in: int, width_out: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(width_in, width_out, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(width_out), act=nn.ReLU(inplace=True)))


class DigitsNet(nn.Module):
    """Five convolutions and a linear classifier; M = 16 divides the input channels of every weight but the stem's."""

    input_size = (1, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.stem = _block(1, 16)
        self.block1 = _block(16, 32)
        self.block2 = _block(32, 32, stride=2)
        self.block3 = _block(32, 64)
        self.block4 = _block(64, 64, kernel=1)
        self.classifier = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Pictures ``(batch, 1, 8, 8)`` to logits ``(batch, 10)``."""
        x = self.block2(self.block1(self.stem(x)))  # batch 32 4 4
        x = self.block4(self.block3(x))  # batch 64 4 4
        return self.classifier(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


def load_demo(*, trained: bool) -> DigitsNet:
    """The demo network in eval mode, with the weights in the package or with random ones."""
    model = DigitsNet()
    if trained:
        model.load_state_dict(load(resources.files("nmfx.demo").joinpath(WEIGHTS).read_bytes()))
    return model.eval()


def load_digits_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(train_x, train_y, test_x, test_y)``: 1,198 and 599 pictures ``(n, 1, 8, 8)``, mean 0 and deviation 1 over training.

    Every third picture is a test picture. The file cycles through the ten digits for long stretches, so the step must not
    share a divisor with 10, or classes would be missing.

    Raises:
        NmfxError: scikit-learn is not installed, or cannot be imported.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise NmfxError(f"the digits come with scikit-learn ({error}): pip install nmfx[demo]") from error
    pictures, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pictures, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels, dtype=torch.int64)
    test = torch.arange(len(x)) % 3 == 0
    x = (x - x[~test].mean()) / x[~test].std()
    return x[~test], y[~test], x[test], y[test]
