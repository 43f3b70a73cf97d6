"""One model of each family and mechanism through the checks of benchmarks/zoo.py; the whole zoo is run there."""

from __future__ import annotations

import pytest
import torch
from zoo import numerics, structure

from nmfx.models.source import find_source

# What is checked on the CPU: outputs, gradients and buffers against pre-masked weights, baking, checkpoint, fx graph.
SMALL = [
    "torchvision:resnet18",
    "torchvision:mobilenet_v3_small",
    "torchvision:googlenet",  # auxiliary heads that run in training only
    "torchvision:lraspp_mobilenet_v3_large",
    "torchvision:ssdlite320_mobilenet_v3_large",
    "timm:convnext_atto",
    "timm:test_nfnet",  # standardised convolutions
    "timm:test_vit",
    "timm:tf_efficientnet_cc_b0_4e",  # expert banks
]
# What is checked on the meta device: sites, keys, copies, every read of a weight through its mask.
LARGE = [
    "torchvision:resnet50",
    "torchvision:vit_b_16",  # nn.MultiheadAttention
    "torchvision:swin_t",  # weights handed to a wrapped function
    "torchvision:maskrcnn_resnet50_fpn",
    "torchvision:raft_small",
    "timm:beit_base_patch16_224",  # F.linear on self.qkv.weight
    "timm:eva02_tiny_patch14_224",
    "timm:halonet26t",  # position tables in matmuls
    "timm:naflexvit_base_patch16_gap",
    "torchvision:mvit_v1_b",
    "timm:hiera_tiny_224",  # defaulted forward arguments
    "timm:swinv2_tiny_window8_256",
]
# Like others, run by `make slow`: LSTMs are in tests/graph, Lite0 in tests/real_weights.
ALIKE_SMALL = ["torchvision:regnet_x_400mf", "torchvision:densenet121"]
ALIKE_SMALL += ["timm:deit_tiny_patch16_224", "timm:tf_efficientnet_lite0"]
ALIKE = ["timm:sequencer2d_s", "torchvision:inception_v3", "timm:swin_tiny_patch4_window7_224", "timm:vit_base_patch16_224"]


def slow(names: list[str]) -> list:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


ODD_WARNINGS = pytest.mark.filterwarnings("ignore")  # of the models themselves


@ODD_WARNINGS
@pytest.mark.parametrize("name", SMALL + slow(ALIKE_SMALL))
def test_masked_equals_premasked(name):
    record = numerics(find_source(name))
    assert record["dense_difference"] == 0
    assert record["graph"] in ("exact", "no root graph")
    assert (record["graph"] == "exact") == ("ssdlite" not in name)


@ODD_WARNINGS
@pytest.mark.parametrize("name", SMALL + LARGE + slow(ALIKE_SMALL + ALIKE))
def test_every_weight_is_a_site_and_read_masked(name):
    record, _ = structure(find_source(name))
    assert record["reads"] == "all masked" or "not followed" in record["reads"]
    assert record["weights"] / (record["weights"] + sum(record["missed"].values())) > 0.995
    assert record["fx"]["share"] > 0.999


@pytest.mark.slow
@ODD_WARNINGS
@pytest.mark.parametrize("name", ["timm:sequencer2d_s", *LARGE[1:3], *LARGE[5:7]])
def test_large_models_on_the_cpu(name):
    torch.set_num_threads(2)
    numerics(find_source(name))
