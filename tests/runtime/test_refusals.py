"""No call of the kernel reads or writes outside its tensors, or ends the process: it raises."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernels import build_kernel

from nmfx.runtime.kernel.library import load_kernel
from nmfx.runtime.layout.packed import pack

ROOT = Path(__file__).parents[2]
INF = float("inf")


def run(**environment: str) -> str:
    """Wrong calls in another process; what it printed."""
    paths = f"{ROOT}:{ROOT}/tests:{ROOT}/tests/runtime"
    command = [sys.executable, str(ROOT / "tests/runtime/wrong.py")]
    env = os.environ | {"PYTHONPATH": paths} | environment
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout


def test_wrong_calls_raise() -> None:
    assert load_kernel() == ""
    printed = run(NMFX_EXAMPLES="150")
    assert "chain refused" in printed
    assert "sparse_conv2d refused" in printed


@pytest.mark.slow
def test_wrong_calls_stay_within_their_tensors(tmp_path: Path) -> None:
    """By the address sanitiser."""
    libraries = [subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
                 for name in ("libasan.so", "libstdc++.so")] if shutil.which("gcc") else []  # fmt: skip
    if len(libraries) < 2 or not all(os.path.isabs(one) for one in libraries):
        pytest.skip("no address sanitiser")
    build_kernel(tmp_path, "-march=native", "-fsanitize=address", "-O1", "-g")
    run(
        LD_PRELOAD=" ".join(libraries),
        ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1",
        NMFX_TEST_KERNEL=str(tmp_path),
        NMFX_EXAMPLES="3000",
    )


def conv(**change: object) -> torch.Tensor:
    """A convolution of 16 channels to 64, as the fault list has it, with something changed."""
    packed = pack(torch.ones(64, 16, 1, 1))
    whole = {"input": torch.zeros(1, 16, 8, 8), "values": packed.values, "columns": packed.columns, "pointers": packed.pointers}
    whole |= {"bias": None, "residual": None, "out": 64, "width": 16, "kernel": (1, 1), "stride": (1, 1), "padding": (0, 0)}
    whole |= {"dilation": (1, 1), "groups": 1, "low": -INF, "high": INF, "chunk": 64, "vectors": 8}
    return torch.ops.nmfx.sparse_conv2d(*(whole | change).values())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"input": torch.zeros(1, 1, 64, 64)}, "pictures of the weight's channels, got 1"),
        ({"input": torch.zeros(1, 32, 8, 8)}, "pictures of the weight's channels, got 32"),
        ({"input": torch.zeros(1, 16, 8, 0)}, "pictures with channels and pixels"),
        ({"input": torch.zeros(16, 8, 8)}, "channels that divide by the groups"),
        ({"input": torch.zeros(1, 16, 8, 8).double()}, "float32 pictures"),
        ({"stride": (0, 1)}, "two strides of 1 to 256"),
        ({"stride": (1,)}, "two strides of 1 to 256"),
        ({"padding": (-1, 0)}, "padding of two or four numbers"),
        ({"dilation": (0, 1)}, "two dilations"),
        ({"groups": 0}, "channels that divide by the groups"),
        ({"out": 2**62}, "output channels that divide"),
        ({"vectors": 9}, "1 to 8 vectors"),
        ({"residual": torch.zeros(1, 64, 8, 8, dtype=torch.bool)}, "a float32 residual of the output's shape"),
        ({"residual": torch.zeros(1, 64, 1, 1)}, "a float32 residual of the output's shape"),
        ({"bias": torch.zeros(63)}, "a contiguous float32 bias"),
        ({"columns": torch.full((1024,), 17, dtype=torch.int16)}, "columns in order and within their chunk"),
        ({"pointers": torch.arange(65, dtype=torch.int32).flip(0) * 16}, "pointers that rise"),
    ],
)
def test_what_a_convolution_refuses(change: dict[str, object], expected: str) -> None:
    assert load_kernel() == ""
    assert conv().shape == (1, 64, 8, 8)
    assert conv(input=torch.zeros(0, 16, 8, 8)).shape == (0, 64, 8, 8)
    with pytest.raises(RuntimeError, match=expected):
        conv(**change)


def test_weights_are_read_again_after_they_have_changed() -> None:
    packed, x = pack(torch.ones(4, 8), chunk=8), torch.ones(2, 8)
    arguments = (x, packed.values, packed.columns, packed.pointers, None, 4, 8, -INF, INF, 8, 1)
    assert torch.ops.nmfx.sparse_linear(*arguments).sum() == 64
    packed.columns[3] = 1000
    with pytest.raises(RuntimeError, match="columns in order"):
        torch.ops.nmfx.sparse_linear(*arguments)
    packed.columns[3] = 3
    assert torch.ops.nmfx.sparse_linear(*arguments).sum() == 64
    packed.pointers[-1] = 1 << 30
    with pytest.raises(RuntimeError, match="pointers that rise"):
        torch.ops.nmfx.sparse_linear(*arguments)


def test_poolings_refuse_a_stride_of_zero() -> None:
    x = torch.zeros(1, 2, 8, 8)
    for stride in ((0, 0), (0, 1), (-1, 1), ()):
        with pytest.raises(RuntimeError, match="two strides"):
            torch.ops.nmfx.max_pool2d(x, (2, 2), stride, (0, 0))
    with pytest.raises(RuntimeError, match="pictures with channels and pixels"):
        torch.ops.nmfx.average(x[:, :, :0])
