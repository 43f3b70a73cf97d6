"""The demo network: its shipped weights, its data, and what is said when scikit-learn is missing."""

from __future__ import annotations

import sys
import types
from importlib import resources

import pytest
import torch

from nmfx import NmfxError, evaluate, find_sites
from nmfx.demo.digits import WEIGHTS, DigitsNet, load_demo, load_digits_data


def test_the_shipped_weights_are_small():
    assert len(resources.files("nmfx.demo").joinpath(WEIGHTS).read_bytes()) < 300_000


def test_the_trained_network_reads_digits():
    _, _, test_x, test_y = load_digits_data()
    assert evaluate(load_demo(trained=True), [(test_x, test_y)]).top1 >= 0.97


def test_an_untrained_network_does_not():
    torch.manual_seed(0)
    _, _, test_x, test_y = load_digits_data()
    assert evaluate(load_demo(trained=False), [(test_x, test_y)]).top1 < 0.5


@pytest.mark.parametrize("trained", [True, False])
def test_load_demo_gives_eval_mode(trained):
    assert not any(module.training for module in load_demo(trained=trained).modules())


def test_every_weight_but_the_stem_divides_by_16():
    sites = find_sites(DigitsNet())
    assert not sites.skipped
    assert [site.name for site in sites if site.length % 16] == ["stem.conv.weight"]
    assert [site.kind for site in sites] == ["conv2d"] * 5 + ["linear"]


def test_the_split_is_the_same_every_time():
    for first, second in zip(load_digits_data(), load_digits_data(), strict=True):
        assert torch.equal(first, second)


def test_the_split_covers_the_file_and_every_class():
    train_x, train_y, test_x, test_y = load_digits_data()
    assert train_x.shape == (1198, 1, 8, 8)
    assert test_x.shape == (599, 1, 8, 8)
    assert test_y[:6].tolist() == [0, 3, 6, 9, 2, 5]  # every third of 0, 1, 2, ...
    assert min(train_y.bincount(minlength=10)) > 100
    assert min(test_y.bincount(minlength=10)) > 50


def test_the_training_pictures_are_normalised():
    train_x, *_ = load_digits_data()
    torch.testing.assert_close((train_x.mean(), train_x.std()), (torch.tensor(0.0), torch.tensor(1.0)))


MISSING = {"sklearn": None, "sklearn.datasets": None}
FOREIGN = {"sklearn": types.ModuleType("sklearn"), "sklearn.datasets": types.ModuleType("sklearn.datasets")}


@pytest.mark.parametrize("modules", [pytest.param(MISSING, id="missing"), pytest.param(FOREIGN, id="foreign")])
def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch, modules):
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(NmfxError, match=r"pip install nmfx\[demo\]"):
        load_digits_data()
