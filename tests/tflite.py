"""An int8 TFLite file of one layer, written with the schema that ethos-u-vela brings along: what Vela compiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

INT32, INT8 = 2, 9  # TFLite's TensorType
CONV, LINEAR = 3, 9  # its BuiltinOperator
SCALE = 0.02


def one_layer(weight: np.ndarray, size: int = 16) -> bytes:
    """A file of one layer: a convolution of int8 weights (out, in, height, width) over pictures of `size`, of stride 1 and with
    the same padding; or a fully connected layer of weights (out, in) over `size` rows.
    """
    import flatbuffers
    from ethosu.vela.tflite import Buffer, Conv2DOptions, FullyConnectedOptions, Model, Operator, OperatorCode, SubGraph

    assert weight.dtype == np.int8
    is_conv, outputs, inputs = weight.ndim == 4, weight.shape[0], weight.shape[1]
    stored = np.ascontiguousarray(np.moveaxis(weight, 1, -1) if is_conv else weight)
    b = flatbuffers.Builder(1024)

    def buffer(content: bytes) -> int:
        data = b.CreateByteVector(content) if content else None
        Buffer.BufferStart(b)
        if data is not None:
            Buffer.BufferAddData(b, data)
        return Buffer.BufferEnd(b)

    buffers = [buffer(content) for content in (b"", b"", stored.tobytes(), np.zeros(outputs, np.int32).tobytes(), b"")]
    pictures = (1, size, size) if is_conv else (size,)
    tensors = [
        _tensor(b, "input", (*pictures, inputs), INT8, 1, SCALE, 1),
        _tensor(b, "weight", stored.shape, INT8, 2, SCALE, outputs),
        _tensor(b, "bias", (outputs,), INT32, 3, SCALE * SCALE, outputs),
        _tensor(b, "output", (*pictures, outputs), INT8, 4, 1.0, 1),
    ]
    if is_conv:
        Conv2DOptions.Conv2DOptionsStart(b)
        for add in ("StrideW", "StrideH", "DilationWFactor", "DilationHFactor"):
            getattr(Conv2DOptions, f"Conv2DOptionsAdd{add}")(b, 1)
        options, kind, code = Conv2DOptions.Conv2DOptionsEnd(b), 1, CONV
    else:
        FullyConnectedOptions.FullyConnectedOptionsStart(b)
        options, kind, code = FullyConnectedOptions.FullyConnectedOptionsEnd(b), 8, LINEAR
    reads, writes = (b.CreateNumpyVector(np.array(of, np.int32)) for of in ([0, 1, 2], [3]))
    Operator.OperatorStart(b)
    Operator.OperatorAddInputs(b, reads)
    Operator.OperatorAddOutputs(b, writes)
    Operator.OperatorAddBuiltinOptionsType(b, kind)
    Operator.OperatorAddBuiltinOptions(b, options)
    operators = _vector(b, SubGraph.SubGraphStartOperatorsVector, [Operator.OperatorEnd(b)])
    held = _vector(b, SubGraph.SubGraphStartTensorsVector, tensors)
    first, last = (b.CreateNumpyVector(np.array(of, np.int32)) for of in ([0], [3]))
    name = b.CreateString("main")
    SubGraph.SubGraphStart(b)
    SubGraph.SubGraphAddTensors(b, held)
    SubGraph.SubGraphAddInputs(b, first)
    SubGraph.SubGraphAddOutputs(b, last)
    SubGraph.SubGraphAddOperators(b, operators)
    SubGraph.SubGraphAddName(b, name)
    graphs = _vector(b, Model.ModelStartSubgraphsVector, [SubGraph.SubGraphEnd(b)])
    OperatorCode.OperatorCodeStart(b)
    OperatorCode.OperatorCodeAddDeprecatedBuiltinCode(b, code)
    OperatorCode.OperatorCodeAddVersion(b, 3)
    OperatorCode.OperatorCodeAddBuiltinCode(b, code)
    codes = _vector(b, Model.ModelStartOperatorCodesVector, [OperatorCode.OperatorCodeEnd(b)])
    contents, said = _vector(b, Model.ModelStartBuffersVector, buffers), b.CreateString("one layer")
    Model.ModelStart(b)
    Model.ModelAddVersion(b, 3)
    Model.ModelAddOperatorCodes(b, codes)
    Model.ModelAddSubgraphs(b, graphs)
    Model.ModelAddDescription(b, said)
    Model.ModelAddBuffers(b, contents)
    b.Finish(Model.ModelEnd(b), b"TFL3")
    return bytes(b.Output())


def _tensor(b: Any, name: str, shape: Sequence[int], kind: int, buffer: int, scale: float, channels: int) -> int:
    from ethosu.vela.tflite import QuantizationParameters as Quantization
    from ethosu.vela.tflite import Tensor

    scales = b.CreateNumpyVector(np.full(channels, scale, np.float32))
    zeros = b.CreateNumpyVector(np.zeros(channels, np.int64))
    Quantization.QuantizationParametersStart(b)
    Quantization.QuantizationParametersAddScale(b, scales)
    Quantization.QuantizationParametersAddZeroPoint(b, zeros)
    quantised = Quantization.QuantizationParametersEnd(b)
    said, sizes = b.CreateString(name), b.CreateNumpyVector(np.array(shape, np.int32))
    Tensor.TensorStart(b)
    Tensor.TensorAddShape(b, sizes)
    Tensor.TensorAddType(b, kind)
    Tensor.TensorAddBuffer(b, buffer)
    Tensor.TensorAddName(b, said)
    Tensor.TensorAddQuantization(b, quantised)
    return Tensor.TensorEnd(b)


def _vector(b: Any, start: Callable[[Any, int], object], offsets: Sequence[int]) -> int:
    start(b, len(offsets))
    for offset in reversed(offsets):
        b.PrependUOffsetTRelative(offset)
    return b.EndVector()
