"""Training rules: the dict is all there is to one."""

from __future__ import annotations

from typing import get_args, get_type_hints

import pytest
import torch
from torch import nn

import nmfx
from nmfx.errors import NmfxError
from nmfx.masking.sites import masked_sites
from nmfx.settings.stages import FinetuneSettings
from nmfx.sparsity.rules import RULES, Rule, describe_rule, resolve_rule

X = torch.randn(4, 8)


def test_every_rule_can_be_said() -> None:
    assert get_args(get_type_hints(FinetuneSettings)["training"]) == tuple(RULES)


@pytest.mark.parametrize(
    ("training", "decay", "expected"),
    [
        ("sr-ste", None, Rule(2e-4)),
        ("sr-ste", 0.5, Rule(0.5)),
        ("sr-ste", 0.0, Rule(0.0)),
        ("ste", 0.5, Rule(0.0)),
        ("fixed", 0.5, Rule(None, frozen=True)),
    ],
)
def test_a_factor_is_taken_where_the_rule_has_one(training: str, decay: float | None, expected: Rule) -> None:
    assert resolve_rule(training, decay) == expected


@pytest.mark.parametrize(("training", "near"), [("srste", "sr-ste"), ("fix", "fixed")])
def test_an_unknown_rule_names_the_nearest(training: str, near: str) -> None:
    with pytest.raises(NmfxError, match=f"unknown training '{training}' .did you mean '{near}'.*known: {', '.join(RULES)}"):
        resolve_rule(training)


def test_what_trains_is_said_by_its_rule() -> None:
    said = [describe_rule(rule.decay, rule.frozen) for rule in RULES.values()]
    assert said == ["sr-ste 0.0002", "ste", "fixed"]
    assert describe_rule(0.1, frozen=True) == "sr-ste 0.1, frozen"
    assert describe_rule(0.0, frozen=True) == "ste, frozen"


def test_a_new_rule_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks that follow the weights, of which only the kept ones train."""
    monkeypatch.setitem(RULES, "asp-refresh", Rule(decay=None))  # type: ignore[misc]
    model = nmfx.transform(nn.Sequential(nn.Linear(8, 4)), "2:4", example_input=X, training="asp-refresh")  # type: ignore[arg-type]
    (site,) = masked_sites(model)
    assert describe_rule(site.spec.decay, site.spec.frozen) == "asp-refresh"
    model(X).square().sum().backward()
    dropped = ~site.mask
    assert site.parameter.grad is not None
    assert not site.parameter.grad[dropped].any()
    with torch.no_grad():
        site.parameter[dropped] = 9.0
    assert site.mask[dropped].all()
