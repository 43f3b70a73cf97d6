"""Laws of recalibrate_bn: the statistics are the batches' own, and nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from awkward import build, same, snapshot
from torch import Tensor, nn

from nmfx.errors import NmfxError
from nmfx.passes.statistics import recalibrate_bn
from nmfx.passes.transform import transform


class Net(nn.Module):
    """Two normalised convolutions with dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)
        self.drop, self.conv2, self.bn2 = nn.Dropout(0.5), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, momentum=0.3)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(torch.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.relu(self.bn2(self.conv2(x))).mean((2, 3)))


def make_batches(count: int) -> list[Tensor]:
    return [torch.randn(6, 4, 5, 5) * (1 + i) + i for i in range(count)]


def spoilt() -> Net:
    """Its running statistics are nonsense, as they are after one-shot pruning."""
    net = Net()
    for norm in (net.bn1, net.bn2):
        norm.running_mean.uniform_(50, 90)
        norm.running_var.uniform_(1e3, 1e4)
        norm.num_batches_tracked.fill_(1234)
    return net


@pytest.mark.parametrize("count", [1, 2, 5])
def test_statistics_are_the_average_over_the_batches(count: int) -> None:
    net, batches = spoilt().eval(), make_batches(count)
    assert recalibrate_bn(net, batches) == count
    outputs = [net.conv1(x).detach() for x in batches]
    means = torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0)
    variances = torch.stack([y.var((0, 2, 3)) for y in outputs]).mean(0)
    torch.testing.assert_close(net.bn1.running_mean, means, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net.bn1.running_var, variances, rtol=1e-4, atol=1e-5)
    # The second layer sees what the first makes of each batch with that batch's own statistics, dropout off.
    hidden = [nn.functional.relu(nn.functional.batch_norm(y, None, None, net.bn1.weight, net.bn1.bias, True)) for y in outputs]
    means = torch.stack([net.conv2(y).mean((0, 2, 3)) for y in hidden]).mean(0).detach()
    torch.testing.assert_close(net.bn2.running_mean, means, rtol=1e-4, atol=1e-5)
    assert (net.bn1.momentum, net.bn2.momentum) == (0.1, 0.3)


def test_the_past_is_forgotten() -> None:
    one, other, batches = spoilt(), Net(), make_batches(3)
    other.load_state_dict({key: value for key, value in one.state_dict().items() if "running" not in key}, strict=False)
    for net in (one, other):
        recalibrate_bn(net, batches)
    assert same(one.state_dict().values(), other.state_dict().values())


def test_batches_may_come_as_a_loader_gives_them() -> None:
    batches, nets = make_batches(3), [spoilt() for _ in range(4)]
    for net in nets[1:]:
        net.load_state_dict(nets[0].state_dict())
    spellings: list[Any] = [
        batches,
        [(x, torch.zeros(6)) for x in batches],
        ([x, torch.zeros(6), "path"] for x in batches),
        iter(batches),
    ]
    for net, spelling in zip(nets, spellings, strict=True):
        assert recalibrate_bn(net, spelling) == 3
        assert same(net.buffers(), nets[0].buffers())


def test_a_network_that_has_not_changed_keeps_its_statistics() -> None:
    """Relative to the dense network, to the last bit; alone they would become those of a few pictures."""
    dense, batches = spoilt(), make_batches(3)
    model = copy.deepcopy(dense)
    before = [buffer.clone() for buffer in dense.buffers()]
    assert recalibrate_bn(model, batches, dense=dense) == 3
    assert same(model.buffers(), before)
    assert same(dense.buffers(), before)


def test_statistics_move_by_what_the_masks_change() -> None:
    dense, batches = Net().eval(), make_batches(3)
    recalibrate_bn(dense, make_batches(8))
    masked = transform(dense, "1:4", example_input=batches[0])
    recalibrate_bn(masked, batches, dense=dense)
    here, there = ([net.conv1(x).detach() for x in batches] for net in (masked, dense))  # the same inputs in both
    means = [torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0) for outputs in (here, there)]
    variances = [torch.stack([y.var((0, 2, 3)) for y in outputs]).mean(0) for outputs in (here, there)]
    torch.testing.assert_close(masked.bn1.running_mean, dense.bn1.running_mean + means[0] - means[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        masked.bn1.running_var, dense.bn1.running_var * variances[0] / variances[1], rtol=1e-4, atol=1e-5
    )


def test_what_fails_leaves_both_networks_as_they_were() -> None:
    dense = spoilt()
    masked = transform(dense, "1:4", example_input=torch.randn(1, 4, 5, 5))
    before = [buffer.clone() for net in (dense, masked) for buffer in net.buffers()]
    with pytest.raises(RuntimeError):
        recalibrate_bn(masked, [*make_batches(1), torch.randn(2, 5, 5, 5)], dense=dense)
    with pytest.raises(NmfxError, match="bn1 is a batch norm of one network only"):
        recalibrate_bn(masked, make_batches(1), dense=nn.Sequential(nn.Linear(3, 3)))
    assert same([buffer for net in (dense, masked) for buffer in net.buffers()], before)


@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
def test_weights_and_modes_stay(mode: str) -> None:
    net = spoilt().train(mode != "eval")
    net.bn1.train(mode == "train")
    modes, weights = [m.training for m in net.modules()], [p.detach().clone() for p in net.parameters()]
    recalibrate_bn(net, make_batches(2))
    assert [m.training for m in net.modules()] == modes
    assert same([p.detach() for p in net.parameters()], weights)
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_a_converted_model_is_calibrated_through_its_masks() -> None:
    net, batches = Net().eval(), make_batches(2)
    masked = transform(net, "1:4", example_input=batches[0])
    recalibrate_bn(masked, batches)
    outputs = [masked.conv1(x).detach() for x in batches]
    torch.testing.assert_close(
        masked.bn1.running_mean, torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0), rtol=1e-4, atol=1e-5
    )
    assert list(masked.state_dict()) == list(net.state_dict())


def test_a_model_without_batch_normalisation_sees_no_batch() -> None:
    model, _ = build("attention")
    before = snapshot(model)

    def never() -> Iterator[Tensor]:
        raise AssertionError("a batch was asked for")
        yield

    assert recalibrate_bn(model, never()) == 0
    assert snapshot(model) == before


def test_a_norm_without_statistics_is_left_alone() -> None:
    net = nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), nn.BatchNorm1d(4))
    assert recalibrate_bn(net, [torch.randn(8, 4)]) == 1
    assert net[0].running_mean is None


def test_a_batch_that_fails_restores_modes_and_momenta() -> None:
    net = spoilt().train()
    with pytest.raises(RuntimeError):
        recalibrate_bn(net, [*make_batches(1), torch.randn(2, 5, 5, 5)])
    assert all(module.training for module in net.modules())
    assert (net.bn1.momentum, net.bn2.momentum) == (0.1, 0.3)


def test_without_a_batch_the_statistics_stay() -> None:
    net = Net()
    for x in make_batches(3):
        net(x)
    before = [buffer.clone() for buffer in net.buffers()]
    with pytest.raises(NmfxError, match="no batches"):
        recalibrate_bn(net, [])
    assert same(net.buffers(), before)
