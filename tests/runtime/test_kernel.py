"""The sparse operators against float64, on random shapes and patterns, with the kernel and without."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernels import build_kernel, use_kernel
from networks import lanes_case
from torch.nn import functional as F

from nmfx.runtime.kernel.library import FOLDER, load_kernel, variants
from nmfx.runtime.layout.packed import pack, unpack
from nmfx.runtime.operators import OPERATORS

INF = float("inf")
ROUNDING = 2e-6  # of the sum of magnitudes: a few roundings of float32, in whatever order
PATTERNS = ["1:16", "2:16", "8:16", "1:32", "3:7", "2:4", "5:12", "1:2", "32:32"]
ROOT = Path(__file__).parents[2]


def masked(weight: torch.Tensor, pattern: str) -> torch.Tensor:
    """Short last groups where rows do not divide."""
    n, m = map(int, pattern.split(":"))
    if n == m:
        return weight
    rows = weight.movedim(1, -1) if weight.dim() == 4 else weight
    lines = F.pad(rows.reshape(-1, rows.shape[-1]), (0, -rows.shape[-1] % m))
    groups = lines.reshape(-1, m)
    kept = torch.zeros_like(groups).scatter_(1, groups.abs().topk(n, 1).indices, 1.0)
    lines = (groups * kept).reshape(lines.shape)[:, : rows.shape[-1]].reshape(rows.shape)
    return (lines.movedim(-1, 1) if weight.dim() == 4 else lines).contiguous()


def random_padding(
    pick: random.Random, kernel: tuple[int, int], dilation: tuple[int, int]
) -> tuple[tuple[int, ...], tuple[int, ...], list[int]]:
    """For the kernel, two numbers or four; for `F.pad`; and the least height and width of pictures."""
    top, left = pick.randint(0, 3), pick.randint(0, 3)
    bottom, right = (pick.randint(0, 3), pick.randint(0, 3)) if pick.random() < 0.5 else (top, left)
    both = zip(kernel, dilation, (top + bottom, left + right), strict=True)
    least = [max(1, d * (k - 1) + 1 - p) for k, d, p in both]
    padding = (top, left) if (top, left) == (bottom, right) else (top, left, bottom, right)
    return padding, (left, right, top, bottom), least


def conv_case(seed: int) -> None:
    """One random convolution, with all that can be fused, against float64."""
    pick, make = random.Random(seed), torch.Generator().manual_seed(seed)
    groups = pick.choice([1, 1, 1, 2, 3])
    width, out = pick.randint(1, 40) * groups, pick.randint(1, 70) * groups
    kernel = (pick.randint(1, 5), pick.randint(1, 5)) if pick.random() < 0.6 else (1, 1)
    stride, dilation = (pick.randint(1, 3), pick.randint(1, 3)), (pick.randint(1, 2), pick.randint(1, 2))
    padding, sides, least = random_padding(pick, kernel, dilation)
    size = [low + pick.randint(0, 40) for low in least]
    draw = lambda *shape: torch.randn(*shape, generator=make)  # noqa: E731
    x, weight = draw(pick.randint(1, 5), width, *size), masked(draw(out, width // groups, *kernel), pick.choice(PATTERNS))
    bias = draw(out) if pick.random() < 0.7 else None
    low, high = pick.choice([(-INF, INF), (0.0, INF), (0.0, 6.0), (-1.0, 1.0)])
    around, start = F.pad(x, sides).double(), None if bias is None else bias.double()
    wanted = F.conv2d(around, weight.double(), start, stride, 0, dilation, groups)
    residual = draw(*wanted.shape) if pick.random() < 0.5 else None
    wanted = (wanted if residual is None else wanted + residual).clamp(low, high)
    packed = pack(weight, groups, chunk=pick.choice([1, 7, 16, 64, 100, 4096]), vectors=pick.randint(1, 8))
    weights = (packed.values, packed.columns, packed.pointers, bias, residual, out, packed.width)
    arguments = (*weights, kernel, stride, padding, dilation, groups)
    found = torch.ops.nmfx.sparse_conv2d(x, *arguments, low, high, packed.chunk, packed.vectors)
    scale = F.conv2d(around.abs(), weight.double().abs(), None, stride, 0, dilation, groups) + 3  # bias and residual
    assert found.shape == wanted.shape
    assert bool(((found - wanted).abs() <= ROUNDING * scale).all())


def linear_case(seed: int) -> None:
    """One random linear layer against float64."""
    pick, make = random.Random(seed), torch.Generator().manual_seed(seed)
    width, out = pick.randint(1, 300), pick.randint(1, 200)
    draw = lambda *shape: torch.randn(*shape, generator=make)  # noqa: E731
    x = draw(*[pick.randint(1, 30) for _ in range(pick.randint(0, 3))], width)
    weight, bias = masked(draw(out, width), pick.choice(PATTERNS)), draw(out) if pick.random() < 0.7 else None
    low, high = pick.choice([(-INF, INF), (0.0, INF), (0.0, 6.0)])
    wanted = F.linear(x.double(), weight.double(), None if bias is None else bias.double()).clamp(low, high)
    packed = pack(weight, chunk=pick.choice([1, 7, 16, 64, 100, 4096]), vectors=pick.randint(1, 8))
    arguments = (packed.values, packed.columns, packed.pointers, bias, out, width, low, high, packed.chunk, packed.vectors)
    found = torch.ops.nmfx.sparse_linear(x, *arguments)
    scale = F.linear(x.double().abs(), weight.double().abs()) + 3  # the bias
    assert found.shape == wanted.shape
    assert bool(((found - wanted).abs() <= ROUNDING * scale).all())


def depthwise_case(seed: int) -> None:
    """One random depthwise convolution against float64."""
    pick, make = random.Random(seed), torch.Generator().manual_seed(seed)
    channels, kernel = pick.randint(1, 20), (pick.randint(1, 5), pick.randint(1, 5))
    stride, dilation = (pick.randint(1, 3), pick.randint(1, 3)), (pick.randint(1, 2), pick.randint(1, 2))
    padding, sides, least = random_padding(pick, kernel, dilation)
    size = [low + pick.randint(0, 40) for low in least]
    draw = lambda *shape: torch.randn(*shape, generator=make)  # noqa: E731
    x, weight, bias = draw(pick.randint(1, 3), channels, *size), draw(channels, 1, *kernel), draw(channels)
    wanted = F.conv2d(F.pad(x, sides).double(), weight.double(), bias.double(), stride, 0, dilation, channels)
    residual = draw(*wanted.shape) if pick.random() < 0.5 else None
    wanted = (wanted if residual is None else wanted + residual).clamp(-1, 6)
    found = torch.ops.nmfx.depthwise_conv2d(x, weight, bias, residual, stride, padding, dilation, -1.0, 6.0)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=2e-5)


def pool_case(seed: int) -> None:
    """Max pooling, NaN and all, bit for bit."""
    pick, make = random.Random(seed), torch.Generator().manual_seed(seed)
    kernel, stride = (pick.randint(1, 5), pick.randint(1, 5)), (pick.randint(1, 3), pick.randint(1, 3))
    padding = (pick.randint(0, kernel[0] // 2), pick.randint(0, kernel[1] // 2))
    x = torch.randn(pick.randint(1, 3), pick.randint(1, 9), pick.randint(5, 40), pick.randint(5, 70), generator=make)
    x[torch.rand(x.shape, generator=make) < 0.01] = float("nan")
    wanted, found = F.max_pool2d(x, kernel, stride, padding), torch.ops.nmfx.max_pool2d(x, kernel, stride, padding)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(torch.ops.nmfx.average(x.nan_to_num()), x.nan_to_num().mean((2, 3), keepdim=True))


def many(count: int) -> None:
    """What other builds of the kernel run, in a process of their own."""
    if load_kernel():
        raise SystemExit(load_kernel())
    for seed in range(count):
        conv_case(seed)
        linear_case(seed)
        pool_case(seed)
        depthwise_case(seed)
        if seed % 5 == 0:
            lanes_case(seed)


@pytest.fixture(scope="module", autouse=True)
def kernel() -> None:
    """These tests are of the kernel: a machine of ours without a compiler fails them."""
    assert load_kernel() == ""


@pytest.mark.parametrize("seed", range(60))
def test_convolutions_follow_float64(seed: int) -> None:
    conv_case(seed)


@pytest.mark.parametrize("seed", range(40))
def test_linear_layers_follow_float64(seed: int) -> None:
    linear_case(seed)


@pytest.mark.parametrize("seed", range(30))
def test_depthwise_convolutions_follow_float64(seed: int) -> None:
    depthwise_case(seed)


@pytest.mark.parametrize("seed", range(20))
def test_pooling_is_pytorchs(seed: int) -> None:
    pool_case(seed)


def test_four_lanes_follow_float64(tmp_path: Path) -> None:
    """As on Arm, by the compiler's own vectors; the source is tested, not the optimiser."""
    build_kernel(tmp_path, "-O0", *(("-march=x86-64",) if os.uname().machine == "x86_64" else ()))
    check_other_kernel(use_kernel(str(tmp_path)))


@pytest.mark.parametrize("name", [path.stem.removeprefix("nmfx_kernel_") for path in sorted(FOLDER.glob("*.so"))])
def test_other_instruction_sets_follow_float64(name: str) -> None:
    if name not in variants():
        pytest.skip("not on this processor")
    check_other_kernel("", NMFX_ISA=name)


def check_other_kernel(before: str, **environment: str) -> None:
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests:{ROOT}/tests/runtime"} | environment
    command = [sys.executable, "-c", f"{before}\nimport test_kernel; test_kernel.many(30)"]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-2000:]


def test_two_threads_give_what_one_gives() -> None:
    make, before = torch.Generator().manual_seed(0), torch.get_num_threads()
    x = torch.randn(2, 32, 14, 14, generator=make)
    packed = pack(masked(torch.randn(64, 32, 3, 3, generator=make), "2:16"))
    arguments = (packed.values, packed.columns, packed.pointers, None, None, 64, 288, (3, 3), *[(1, 1)] * 3, 1, -INF, INF)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(torch.ops.nmfx.sparse_conv2d(x, *arguments, 64, 8))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize(("shape", "groups"), [((7, 5), 1), ((6, 3, 3, 3), 3), ((4, 300), 2)])
@pytest.mark.parametrize("chunk", [1, 4, 64, 65536])
def test_unpacked_is_what_was_packed(shape: tuple[int, ...], groups: int, chunk: int) -> None:
    weight = masked(torch.randn(shape, generator=torch.Generator().manual_seed(0)), "1:2")
    packed = pack(weight, groups, chunk=chunk)
    assert len(packed.values) == weight.count_nonzero()
    assert torch.equal(unpack(packed.values, packed.columns, packed.pointers, shape, groups, chunk), weight)


def test_padding_wider_than_pictures() -> None:
    make = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, 3, 5, 6, generator=make), masked(torch.randn(4, 3, 3, 3, generator=make), "1:2")
    packed, one = pack(weight), (1, 1)
    options = (None, None, 4, 27, (3, 3), one, (140, 140), one, 1, -INF, INF, packed.chunk, packed.vectors)
    found = torch.ops.nmfx.sparse_conv2d(x, packed.values, packed.columns, packed.pointers, *options)
    torch.testing.assert_close(found, F.conv2d(x, weight, padding=140))
    small = (None, None, 4, 27, (3, 3), (2, 2), (0, 0), one, 1, -INF, INF, packed.chunk, packed.vectors)
    with pytest.raises(RuntimeError, match="pictures no smaller than the kernel"):
        torch.ops.nmfx.sparse_conv2d(x[:, :, :2], packed.values, packed.columns, packed.pointers, *small)


def test_columns_beyond_15_bits() -> None:
    make = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 60_000, generator=make), masked(torch.randn(2, 60_000, generator=make), "1:32")
    packed = pack(weight, chunk=65536, vectors=1)
    options = (None, 2, 60_000, -INF, INF, 65536, 1)
    found = torch.ops.nmfx.sparse_linear(x, packed.values, packed.columns, packed.pointers, *options)
    torch.testing.assert_close(found.double(), F.linear(x.double(), weight.double()), rtol=1e-4, atol=1e-3)
    assert torch.equal(unpack(packed.values, packed.columns, packed.pointers, (2, 60_000), 1, 65536), weight)


def test_plain_pytorch_says_the_same() -> None:
    make, plain = torch.Generator().manual_seed(0), {name: one.without_kernel for name, one in OPERATORS.items()}
    x, weight = torch.randn(2, 12, 9, 9, generator=make), masked(torch.randn(8, 6, 3, 3, generator=make), "2:4")
    packed, bias = pack(weight, 2, chunk=16), torch.randn(8, generator=make)
    weights = (packed.values, packed.columns, packed.pointers, bias, None, 8, 54)
    for padding in [(1, 1), (0, 1, 2, 0)]:
        arguments = (*weights, (3, 3), (2, 2), padding, (1, 1), 2, 0.0, 6.0, 16, 4)
        torch.testing.assert_close(plain["sparse_conv2d"](x, *arguments), torch.ops.nmfx.sparse_conv2d(x, *arguments))
        kernels, options = torch.randn(12, 1, 3, 3, generator=make), (None, (2, 1), padding, (1, 1), 0.0, 6.0)
        found = torch.ops.nmfx.depthwise_conv2d(x, kernels, None, *options)
        torch.testing.assert_close(plain["depthwise_conv2d"](x, kernels, None, *options), found)
    torch.testing.assert_close(plain["average"](x), torch.ops.nmfx.average(x))
    flat = pack(weight[:, :, 0, 0].contiguous(), chunk=4)
    tokens, rest = torch.randn(3, 5, 6, generator=make), (flat.values, flat.columns, flat.pointers, bias, 8, 6, 0.0, INF, 4, 4)
    torch.testing.assert_close(plain["sparse_linear"](tokens, *rest), torch.ops.nmfx.sparse_linear(tokens, *rest))


def test_torch_sees_the_shapes() -> None:
    make = torch.Generator().manual_seed(0)
    for kernel, stride, padding in itertools.product([(1, 1), (3, 2)], [(1, 1), (2, 3)], [(1, 0), (0, 1, 1, 0)]):
        weight = masked(torch.randn(8, 6, *kernel, generator=make), "2:4")
        packed = pack(weight)
        weights = (packed.values, packed.columns, packed.pointers, None, None, 8, packed.width)
        arguments = (*weights, kernel, stride, padding, (1, 1), 1, 0.0, INF)
        torch.library.opcheck(
            torch.ops.nmfx.sparse_conv2d,
            (torch.randn(2, 6, 9, 11, generator=make), *arguments, 64, 8),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"input": torch.zeros(3, 4, dtype=torch.float64)}, "float32 tokens"),
        ({"pointers": torch.zeros(3, dtype=torch.int32)}, "packed weights of this shape"),
        ({"vectors": 9}, "1 to 8 vectors"),
        ({"bias": torch.zeros(2)}, "a contiguous float32 bias"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, expected: str) -> None:
    packed = pack(torch.ones(6, 4))
    whole = {"input": torch.zeros(3, 4), "values": packed.values, "columns": packed.columns, "pointers": packed.pointers}
    whole |= {"bias": None, "out_features": 6, "width": 4, "low": -INF, "high": INF, "chunk": 64, "vectors": 8}
    with pytest.raises(RuntimeError, match=expected):
        torch.ops.nmfx.sparse_linear(*(whole | change).values())
