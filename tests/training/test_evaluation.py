"""Laws of evaluate: counts as one counts by hand, over any cut into batches, and leaves the model as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from awkward import build, same, snapshot
from torch import Tensor, nn

from nmfx.errors import DataError
from nmfx.passes.baking import bake
from nmfx.passes.transform import transform
from nmfx.training.evaluation import Evaluation, evaluate


class Table(nn.Module):
    """Its answers are written down: the input is the index of a row of logits."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        return self.logits[x]


def test_counted_by_hand() -> None:
    logits = torch.tensor([[9.0, 0, 0, 0, 0, 0, 0], [7, 6, 5, 4, 3, 2, 1], [7, 6, 5, 4, 3, 2, 1], [0, 0, 0, 0, 0, 0, 5]])
    labels = torch.tensor([0, 4, 5, 6])  # first; fifth; sixth; first
    found = evaluate(Table(logits), [(torch.arange(4), labels)])
    loss = -torch.log_softmax(logits.double(), 1)[range(4), labels].mean()
    assert (found.top1, found.top5, found.samples) == (0.5, 0.75, 4)
    assert found.loss == pytest.approx(float(loss), rel=1e-6)


@pytest.mark.parametrize("size", [1, 3, 7, 20])
def test_batches_of_any_size_give_the_same(size: int) -> None:
    model, labels = Table(torch.randn(20, 8)), torch.randint(8, (20,))
    whole = evaluate(model, [(torch.arange(20), labels)])
    cut = evaluate(model, zip(torch.arange(20).split(size), labels.split(size), strict=True))
    assert (cut.top1, cut.top5, cut.loss) == pytest.approx((whole.top1, whole.top5, whole.loss), rel=1e-5)
    assert cut.samples == 20


def test_few_classes_have_a_top5_of_one() -> None:
    found = evaluate(Table(torch.randn(6, 3)), [(torch.arange(6), torch.randint(3, (6,)))])
    assert found.top5 == 1
    assert isinstance(found, Evaluation)


def test_half_precision_is_measured_in_full() -> None:
    logits, labels = torch.randn(50, 10), torch.randint(10, (50,))
    half, full = (evaluate(Table(x), [(torch.arange(50), labels)]) for x in (logits.bfloat16(), logits.bfloat16().float()))
    assert half == full


def test_no_batch_is_an_error() -> None:
    with pytest.raises(DataError, match="no pictures to evaluate on"):
        evaluate(Table(torch.randn(2, 3)), [])


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_the_model_is_left_as_it_was(train: bool) -> None:
    model, example = build("residual")
    model.train(train)
    before = snapshot(model)
    evaluate(model, [(example.args[0], torch.tensor([0, 1]))])
    assert snapshot(model) == before


def test_the_modes_of_a_models_parts_survive() -> None:
    model, example = build("residual")
    model.train()
    model.bn1.eval()
    evaluate(model, [(example.args[0], torch.tensor([0, 1]))])
    assert [module.training for module in (model, model.bn0, model.bn1)] == [True, True, False]


def test_the_mode_comes_back_when_a_batch_fails() -> None:
    model, example = build("residual")
    model.train()

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        yield example.args[0], torch.tensor([0, 1])
        raise KeyError

    with pytest.raises(KeyError):
        evaluate(model, batches())
    assert all(module.training for module in model.modules())


def test_a_converted_model_scores_as_its_baked_copy() -> None:
    model, example = build("residual")
    masked = transform(model, "2:4", example_input=example)
    batches = [(torch.randn(16, 3, 6, 6), torch.randint(4, (16,)))]
    assert evaluate(masked, batches) == evaluate(bake(masked), batches)
    assert same([masked.fc.weight], [bake(masked).fc.weight])
