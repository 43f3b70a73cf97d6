"""What `nmfx bench` times networks beside: dense engines that run ONNX files, one entry each."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from nmfx.settings.methods import Function


@dataclass(frozen=True)
class Engine:
    """An engine that runs ONNX files.

    Attributes:
        label: what tables call it.
        packages: that have to be installed for it.
        function: ``(path, x, threads) -> run``: a call of the network, from its ONNX file with a free batch, the batch to run,
            and a number of threads.
        int8: whether the network is quantised first.
    """

    label: str
    packages: tuple[str, ...]
    function: Function
    int8: bool = False

    @property
    def is_installed(self) -> bool:
        """Whether its packages can be found; none is imported."""
        return all(map(find_spec, self.packages))


_OPEN = "nmfx.runtime.measuring.engines"
ENGINES: dict[str, Engine] = {  # by the names that --engines takes
    "onnxruntime": Engine("ONNX Runtime", ("onnxruntime",), f"{_OPEN}:onnxruntime_fp32"),
    "openvino": Engine("OpenVINO", ("openvino",), f"{_OPEN}:openvino_fp32"),
    "onnxruntime-int8": Engine("ONNX Runtime, int8", ("onnxruntime", "onnx"), f"{_OPEN}:onnxruntime_int8", int8=True),
    "openvino-int8": Engine("OpenVINO, int8", ("openvino", "nncf"), f"{_OPEN}:openvino_int8", int8=True),
}
