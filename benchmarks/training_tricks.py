"""Training tricks that are measured by benchmarks/finetuning.py and live here alone, as none is shipped."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import timm.optim._optim_factory
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nmfx.masking.owner import unmask_model
from nmfx.masking.sites import masked_sites, respec
from nmfx.sparsity.layout import Grouping
from nmfx.sparsity.mask import make_mask
from nmfx.sparsity.pattern import Pattern
from nmfx.sparsity.rules import RULES
from nmfx.training.record import Progress

Hook = Callable[[nn.Module], Callable[[Progress], None]]  # prepares a masked model; told of every update
PRECONDITIONED = 12  # first updates of STEP, without masks


class Through(torch.autograd.Function):
    """``where(mask, weight * factor, 0)``; the gradient goes straight through the mask, and SR-STE pulls what is dropped."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, factor: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(weight, factor, mask)
        return torch.where(mask, weight * factor, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, factor, mask = ctx.saved_tensors
        return grads[0] * factor + RULES["sr-ste"].decay * torch.where(mask, 0.0, weight), None, None


def importance(weight: Tensor) -> Tensor:
    """``1 + filter-wise + kernel-wise importance``, each the sigmoid of its standardised sum of magnitudes."""
    size, factor = weight.abs(), torch.ones(())
    for dims in (tuple(range(1, weight.dim())), tuple(range(2, weight.dim()))):
        sums = size.sum(dims, keepdim=True) if dims else size
        factor = factor + torch.sigmoid((sums - sums.mean()) / sums.std())
    return factor


class Soft(nn.Module):
    """The soft mask of MaxQ (Xiang et al., CVPR 2024): kept weights times their importance, groups made sparse gradually.

    How importances are normalised is our choice; the first values are those of the weight without it.
    """

    def __init__(self, n: int, grouping: Grouping) -> None:
        super().__init__()
        self.n, self.grouping, self.share = n, grouping, 0.0

    def right_inverse(self, value: Tensor) -> Tensor:
        factor = importance(value)
        for _ in range(200):
            factor = factor**0.95 * importance(value / factor) ** 0.05  # in small steps, or it swings
        return value / factor

    def forward(self, weight: Tensor) -> Tensor:
        dense = weight.detach()
        mask = make_mask(dense, self.n, self.grouping)
        (block,) = self.grouping.blocks(self.grouping.as_lines(dense.abs().contiguous()))
        sums = block.sum(2, keepdim=True)  # outer, groups, 1, inner
        rank = sums.flatten().argsort().argsort().view(sums.shape)
        late = (rank >= round(self.share * sums.numel())).expand(block.shape).reshape(weight.shape)
        return Through.apply(weight, importance(dense), mask | late)


def gradually(model: nn.Module) -> Callable[[Progress], None]:
    """N falls from M to its value by a cubic over the first half of the updates (Zhu and Gupta, 2017)."""
    sites = list(masked_sites(model))
    final = [site.spec.pattern for site in sites]

    def at(share: float) -> None:
        left = max(0.0, 1 - 2 * share) ** 3
        for site, pattern in zip(sites, final, strict=True):
            n = pattern.n + math.ceil(left * (pattern.m - pattern.n))
            if n != site.spec.pattern.n:
                respec([site], pattern=Pattern(n, pattern.m))

    at(0.0)
    return lambda progress: at(progress.share)


def softly(model: nn.Module) -> Callable[[Progress], None]:
    """`Soft` in place of the masks; all groups are sparse after half of the updates."""
    specs = [(site.path, site.spec) for site in masked_sites(model)]
    values = {path: model.get_submodule(path)._parameters["weight"].detach().clone() for path, _ in specs}
    unmask_model(model, keep_masked=False)
    masks = []
    for path, spec in specs:
        assert not spec.grouping.flat
        masks.append(Soft(spec.pattern.n, spec.grouping))
        parametrize.register_parametrization(model.get_submodule(path), "weight", masks[-1])
        torch.testing.assert_close(model.get_submodule(path).weight, values[path], rtol=1e-3, atol=1e-5)

    def told(progress: Progress) -> None:
        for mask in masks:
            mask.share = 1 - max(0.0, 1 - 2 * progress.share) ** 3

    return told


class Step(torch.optim.Optimizer):
    """AdamW whose second moment stays after `PRECONDITIONED` updates (STEP, Lu et al., ICML 2023, algorithm 1)."""

    def __init__(self, params: Any, lr: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            first, second = group["betas"]
            for weight in (p for p in group["params"] if p.grad is not None):
                state = self.state[weight]
                if not state:
                    state |= {"step": 0, "mean": torch.zeros_like(weight), "square": torch.zeros_like(weight)}
                state["step"] += 1
                state["mean"].lerp_(weight.grad, 1 - first)
                if state["step"] <= PRECONDITIONED:
                    state["square"].mul_(second).addcmul_(weight.grad, weight.grad, value=1 - second)
                root = (state["square"] / (1 - second ** min(state["step"], PRECONDITIONED))).sqrt_().add_(1e-8)
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.addcdiv_(state["mean"], root, value=-group["lr"] / (1 - first ** state["step"]))


timm.optim._optim_factory.default_registry.register(
    timm.optim.OptimInfo("step", Step, "STEP", has_momentum=False, has_eps=False)
)


def preconditioned(model: nn.Module) -> Callable[[Progress], None]:
    """Dense for the updates in which `Step` learns its second moment, then masked."""
    sites = list(masked_sites(model))
    final = [site.spec.pattern for site in sites]
    for site, pattern in zip(sites, final, strict=True):
        respec([site], pattern=Pattern(pattern.m, pattern.m))

    def told(progress: Progress) -> None:
        if progress.epoch * progress.steps + progress.step + 1 == PRECONDITIONED:
            for site, pattern in zip(sites, final, strict=True):
                respec([site], pattern=pattern)

    return told
