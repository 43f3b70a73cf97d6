"""Where a network is to run, and what runs faster there: one entry a platform, with where that is said. Imports no torch.

`nmfx search --for NAME` offers sites the patterns of an entry and leaves dense what would gain nothing; `nmfx export --for
NAME` writes the format of an entry and says of every site whether it will run sparse, and why not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nmfx.sparsity.pattern import Pattern

if TYPE_CHECKING:
    from nmfx.models.site import Site


@dataclass(frozen=True)
class Platform:
    """What one runtime or processor makes of zeros.

    Attributes:
        label: its name for people.
        gain: what gets faster there, in a line.
        sources: who says so.
        checked: what was tried with its own tools, and what is a rule only.
        format: the one of `nmfx.settings.formats.FORMATS` that it takes.
        then: what to do with the file.
        takes: ``pattern -> why it gains nothing``; empty where it does gain.
        runs: ``site -> why no pattern of it gains anything``; empty where one does.
        how: ``site -> what running sparse means there``, or has to be heeded; empty where that goes without saying.
        patterns: what a search offers where nothing else is asked; none: the patterns of `Choices`.
        whole: groups have to lie within one row of input channels, all of them full.
        measured: what runs sparse is not a rule: it was timed for the file that was written.
    """

    label: str
    gain: str
    sources: tuple[str, ...]
    checked: str
    format: str
    then: str
    takes: Callable[[Pattern], str]
    runs: Callable[[Site], str]
    how: Callable[[Site], str]
    patterns: tuple[str, ...] = ()
    whole: bool = True
    measured: bool = False

    def reason(self, site: Site, pattern: Pattern) -> str:
        """Why a site does not run sparse under a pattern; empty where it does."""
        never = self.runs(site)
        if pattern.is_dense:
            return f"dense in the scheme{f' ({never})' if never else ''}"
        return self.takes(pattern) or never


def _two_of_four(pattern: Pattern) -> str:
    """2:4 hardware reads any weight that keeps at most two of every aligned four: 1:4, 2:8 and 1:16 are such, 4:16 is not."""
    fits = (pattern.m % 4 == 0 and pattern.n <= 2) or (pattern.n, pattern.m) == (1, 2)
    return "" if fits else f"{pattern} may keep more than 2 of 4 consecutive input channels"


def _is_product(site: Site) -> bool:
    return site.kind in ("linear", "matmul")


def _single(site: Site) -> str:
    return ("depthwise: " if site.conv_groups > 1 else "") + "one input channel" if site.length == 1 else ""


def _on_tensorrt(site: Site) -> str:
    if not (_is_product(site) or site.kind in ("conv2d", "conv3d")):
        return f"{site.kind}: sparse kernels are for convolutions and matrix products"
    return _single(site) or ("" if site.length % 4 == 0 else f"in={site.length} does not divide by 4")


def _on_ethos(site: Site) -> str:
    if site.kind not in ("linear", "conv2d"):
        return f"{site.kind}: not tried with Vela, which compiles conv2d and fully connected layers sparse"
    return _single(site)


def _aligned(site: Site) -> str:
    """Sparse tensor cores read 16 channels at a time in FP16 and 32 in INT8; TensorRT fills up what is missing."""
    outputs = site.weights // (site.length * _positions(site) * site.conv_groups)
    odd = next((size for size in (site.length, outputs) if size % 16), 0)
    return f"{odd} channels do not divide by 16: they are filled up" if odd else ""


def _positions(site: Site) -> int:
    return 1 if _is_product(site) else math.prod(site.shape[2:])


def _in_coreml(site: Site) -> str:
    return "N:M kernels of newer CPUs" if _is_product(site) else "less to load, for the Neural Engine"


def _for_coreml(pattern: Pattern) -> str:
    if 16 % pattern.m:
        return f"{pattern}: M has to be a factor of 16"
    return "" if 2 * pattern.n <= pattern.m else f"{pattern}: at least half of each group has to be zeros"


def _on_openvino(site: Site) -> str:
    if not _is_product(site):
        return f"{site.kind}: only matrix products read packed weights"
    outputs = site.weights // site.length
    fits = site.length % 64 == 0 and outputs % 64 == 0
    return "" if fits else f"in={site.length}, out={outputs}: both have to divide by 64"


def _for_openvino(pattern: Pattern) -> str:
    return "" if 2 * pattern.n < pattern.m else f"{pattern}: more than half of the weights have to be zeros"


def _anything(_: object) -> str:
    return ""


def _no_kernels(_: object) -> str:
    return "no sparse kernels: zeros are multiplied like any other weight"


PLATFORMS: dict[str, Platform] = {
    "nmfx": Platform(
        label="nmfx's own CPU runtime",
        gain="any pattern of any site, where it is faster than dense as timed on the machine; masks that rows share gain most",
        sources=("docs/runtime.md",),
        checked="measured for each site when the file is written",
        format="compiled",
        then="nmfx.load_compiled(FILE)",
        takes=_anything,
        runs=_anything,
        how=_anything,
        whole=False,
        measured=True,
    ),
    "tensorrt": Platform(
        label="TensorRT on NVIDIA GPUs with sparse tensor cores (Ampere and later)",
        gain="at most 2 of every 4 input channels, per output and kernel position, in FP16 or INT8; TensorRT times its kernels "
        "and takes a sparse one where it wins, mostly from 256 channels on, which 16 (FP16) or 32 (INT8) should divide",
        sources=(
            # "every four input channels must have at least two zeros", [K, C, R, S] and C % 4 == 0
            "https://docs.nvidia.com/deeplearning/tensorrt/10.16.1/inference-library/io-formats-sparsity.html",
            # "only have benefit when convolution channels are large enough (256 or above)"
            "https://github.com/NVIDIA/TensorRT/issues/4065",
        ),
        checked="rule only: its builder needs such a GPU; weights of the ONNX file are tested against it, also in int8 (QDQ)",
        format="onnx",
        then="trtexec --onnx=FILE --fp16 --sparsity=enable",
        takes=_two_of_four,
        runs=_on_tensorrt,
        how=_aligned,
        patterns=("2:4",),
    ),
    "ethos-u85": Platform(
        label="Arm Ethos-U85",
        gain="at most 2 of every 4 input channels of int8 weights; Vela decides by its estimate of cycles, and leaves the "
        "smallest layers dense",
        sources=(
            "https://developer.arm.com/documentation/102685/",  # technical reference: 2:4 sparse weights
            "https://pypi.org/project/ethos-u-vela/",  # its output: weight_sparsity = WEIGHT_SPARSITY_SPARSE_2_4
        ),
        checked="compiled by ethos-u-vela 5.2: convolutions, grouped ones, 1x1 and 3x3, fully connected",
        format="baked",
        then="quantise to int8 (ExecuTorch's Arm backend, or TFLite), then vela --accelerator-config ethos-u85-256",
        takes=_two_of_four,
        runs=_on_ethos,
        how=lambda _: "as Vela estimates its cycles",
        patterns=("2:4",),
    ),
    "coreml": Platform(
        label="Core ML",
        gain="linear layers on newer CPUs, M a factor of 16 and at least half zeros (Core ML counts zeros: 4:16 here is 12:16 "
        "there); on the Neural Engine weights that are mostly zeros load faster, whatever the layer",
        sources=("https://apple.github.io/coremltools/docs-guides/source/opt-pruning-perf.html",),
        checked="converted and stored sparse by coremltools 9 on Linux; its speed is a rule only: it runs on Apple's systems",
        format="baked",
        then="docs/platforms.md has the lines of coremltools",
        takes=_for_coreml,
        runs=_single,
        how=_in_coreml,
    ),
    "openvino": Platform(
        label="OpenVINO on CPUs",
        gain="no N:M kernel; int8 matrix products whose sides divide by 64 read packed weights on CPUs with AMX, above half "
        "zeros, with CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE set",
        sources=(
            # limitations: int8, matrix multiplication, Intel AMX, input and output channels a multiple of 64
            "https://docs.openvino.ai/2025/openvino-workflow/running-inference/inference-devices-and-modes/cpu-device.html",
            "https://docs.openvino.ai/2025/api/c_cpp_api/group__ov__runtime__cpu__prop__cpp__api.html",
        ),
        checked="the file runs in OpenVINO 2026.4; the packed weights are a rule only: no machine with AMX was at hand",
        format="onnx",
        then="nncf.quantize, then compile_model(model, 'CPU', {'CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE': 0.5})",
        takes=_for_openvino,
        runs=_on_openvino,
        how=lambda _: "packed int8 weights, on CPUs with AMX",
    ),
    "onnxruntime": Platform(
        label="ONNX Runtime on CPUs",
        gain="nothing: its kernels multiply zeros like any other weight",
        sources=(
            "https://github.com/microsoft/onnxruntime/issues/2121",
            "https://github.com/microsoft/onnxruntime/issues/5578",
        ),
        checked="the file runs in ONNX Runtime 1.32, with the outputs of PyTorch",
        format="onnx",
        then="onnxruntime.InferenceSession(FILE)",
        takes=_anything,
        runs=_no_kernels,
        how=_anything,
    ),
}
