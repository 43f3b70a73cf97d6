"""Forward passes that wait for each other: the same results, one at a time, and no thread is left."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nmfx.passes.lockstep import running


def stop_at_products(name: str, args: Any) -> str | None:
    return name if name in ("aten::addmm", "aten::mm") else None


def test_every_run_stops_where_it_was_asked_to_and_ends() -> None:
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), list(torch.randn(3, 5, 4))
    before = threading.active_count()
    with running(model, inputs, stop_at_products) as runs:
        for layer in (0, 2):
            calls = [run.advance() for run in runs]
            assert all(call is not None and call.tag == "aten::addmm" for call in calls)
            expected = [model[:layer](x) for x in inputs]
            for call, wanted in zip(calls, expected, strict=True):
                assert call is not None
                assert torch.equal(call.args[1], wanted)
        assert [run.advance() for run in runs] == [None] * 3
    assert threading.active_count() == before


def test_what_is_written_while_runs_wait_is_what_they_read() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)), torch.randn(2, 4)
    with torch.no_grad(), running(model, [x], stop_at_products) as (run,):
        run.advance()
        model[0].weight.zero_()
        call = run.advance()
        assert call is not None
        assert not call.args[0].any()


def test_what_fails_in_a_run_fails_here_and_no_thread_is_left() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x @ torch.eye(4)
            raise ValueError("the model's own")

    before = threading.active_count()
    with running(Broken(), [torch.ones(1, 4)] * 3, stop_at_products) as runs:
        for run in runs:
            run.advance()
        with pytest.raises(ValueError, match="the model's own"):
            runs[0].advance()
    assert threading.active_count() == before
