"""What a user of a CPU would install instead: dense engines that run a network from its ONNX file, in fp32 and in int8.

The int8 ones quantise the dense network after training, as their own documents say (per output channel, calibrated on the
pictures at hand); how accurate that is, is not looked at here.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from nmfx.errors import NmfxError
from nmfx.runtime.kernel.library import processor
from nmfx.settings.engines import Engine
from nmfx.settings.methods import resolve

Run = Callable[[], object]
CALIBRATION = 8  # batches: ranges, which change no time


def open_engine(engine: Engine, path: Path, x: Tensor, threads: int) -> Run:
    """A call of a network on an engine.

    Args:
        path: the network as ONNX, with a free batch.
        x: the batch to run.
        threads: of the engine.

    Raises:
        NmfxError: the engine is missing, or cannot run the network.
    """
    try:
        with _silent():
            run: Run = resolve(engine.function)(path, x, threads)
            return run
    except ImportError as error:
        raise NmfxError(f"pip install 'nmfx[engines]' ({error})") from None
    except Exception as error:  # whatever an engine raises: an engine less
        raise NmfxError(" ".join(f"{type(error).__name__}: {error}".split())[:200]) from error


def onnxruntime_fp32(path: Path, x: Tensor, threads: int) -> Run:
    """ONNX Runtime as it comes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)


def onnxruntime_int8(path: Path, x: Tensor, threads: int) -> Run:
    """ONNX Runtime after its own static quantisation."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    name = onnx.load(str(path), load_external_data=False).graph.input[0].name

    class Batches(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter([{name: one} for one in _batches(x)])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    with tempfile.TemporaryDirectory() as folder:
        whole, small = Path(folder) / "whole.onnx", Path(folder) / "int8.onnx"
        quant_pre_process(str(path), str(whole), skip_symbolic_shape=True)
        quantize_static(
            str(whole), str(small), Batches(), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            reduce_range="vnni" not in processor(),  # whose 16-bit sums saturate
        )  # fmt: skip
        return onnxruntime_fp32(small, x, threads)


def openvino_fp32(path: Path, x: Tensor, threads: int) -> Run:
    """OpenVINO, held to float32."""
    import openvino

    return _compiled(openvino.Core().read_model(str(path)), x, threads)


def openvino_int8(path: Path, x: Tensor, threads: int) -> Run:
    """OpenVINO after quantisation by NNCF."""
    import nncf
    import openvino

    model = openvino.Core().read_model(str(path))
    quantised = nncf.quantize(model, nncf.Dataset(_batches(x)), subset_size=CALIBRATION)
    return _compiled(quantised, x, threads)


def _compiled(model: Any, x: Tensor, threads: int) -> Run:
    import openvino

    model.reshape(list(x.shape))
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    batch = x.numpy()
    return lambda: request.infer([batch], share_inputs=True)


def _batches(x: Tensor) -> list[np.ndarray]:
    """The pictures at hand, and noise about them: enough for ranges."""
    noise = np.random.default_rng(0)
    spread = float(x.std()) or 1.0
    found = [x.numpy()]
    return found + [x.numpy() + noise.normal(0, spread, tuple(x.shape)).astype(np.float32) for _ in range(CALIBRATION - 1)]


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Engines print and log what they do."""
    loggers = [logging.getLogger(name) for name in ("nncf", "root", "onnxruntime", "openvino")]
    before = [one.level for one in loggers]
    try:
        for one in loggers:
            one.setLevel(logging.ERROR)
        with open("/dev/null", "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            yield
    finally:
        for one, level in zip(loggers, before, strict=True):
            one.setLevel(level)
