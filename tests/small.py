"""Small models to search: their sites differ in size, in MACs per weight, in rows that M divides, and in scale."""

from __future__ import annotations

from functools import cache

import timm
import torch
from torch import Tensor, nn

from nmfx.demo.digits import load_demo
from nmfx.models.census import find_sites
from nmfx.models.site import Sites


class Mixed(nn.Module):
    """Rows of 3, 16, 24, 1, 32, 10 (of two groups) and 16 input channels; the last site runs in train mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 3, stride=2, padding=1)
        self.point, self.depthwise = nn.Conv2d(24, 32, 1), nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.deep, self.grouped = nn.Conv2d(32, 20, 3, padding=1), nn.Conv2d(20, 16, 1, groups=2)
        self.head, self.aux = nn.Linear(16, 10), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.deep(self.depthwise(torch.relu(self.point(torch.relu(self.wide(torch.relu(self.stem(x))))))))
        x = self.grouped(x).mean((2, 3))
        return self.head(x) + self.aux(x) if self.training else self.head(x)


def _scaled(model: nn.Module) -> nn.Module:
    """Weights of heavy-tailed groups, each site on a scale of its own, as in a trained network."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                scale = torch.rand((), generator=generator).mul(4).exp()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) ** 3 * scale)
    return model.eval()


MODELS = {
    "mixed": (lambda: _scaled(Mixed()), (3, 8, 8)),
    "digits": (lambda: load_demo(trained=True), (1, 8, 8)),
    "timm": (lambda: _scaled(timm.create_model("test_resnet", num_classes=10)), (3, 32, 32)),
}


@cache
def searched(name: str) -> tuple[nn.Module, Sites]:
    """The model called `name` and its sites, made once: a search leaves it alone."""
    make, size = MODELS[name]
    model = make()
    return model, find_sites(model, torch.empty(1, *size))
