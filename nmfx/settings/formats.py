"""The formats that the export stage writes on demand, beside the compressed checkpoint: one entry each, options and all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from nmfx.settings.methods import Function
from nmfx.settings.option import option

T = TypeVar("T")


@dataclass(frozen=True)
class Format:
    """One file of a baked model.

    Attributes:
        help: of its option.
        ending: of the file's name.
        function: ``(model, path, example, **options)``, which writes it, and may give lines to say of it; `example` is an input
            of the model, an `Example`. It may write ``PATH.data`` beside it.
        takes: what else it is given, by keyword: options of the export settings, ``progress``, a `Progress`,
            and ``calibration``, pictures for int8 or None.
    """

    help: str
    ending: str
    function: Function
    takes: tuple[str, ...] = ()


FORMATS: dict[str, Format] = {
    "baked": Format("also a plain state dict with real zeros", ".baked.safetensors", "nmfx.export.plain:save_baked"),
    "onnx": Format(
        "also an ONNX file with real zeros and a free batch (needs nmfx[onnx])",
        ".onnx",
        "nmfx.export.onnx:save_onnx",
        takes=("opset", "free_size"),
    ),
    "compiled": Format(
        "also a model compiled for this processor (nmfx.load_compiled)",
        ".nmfxc",
        "nmfx.runtime.saved.writing:save_compiled",
        takes=("batch", "progress", "calibration"),
    ),
}


def with_formats(cls: type[T]) -> type[T]:
    """Below `dataclass`: an option for each format, off unless asked for."""
    for name, one in FORMATS.items():
        cls.__annotations__[name] = "bool"
        setattr(cls, name, option(False, one.help))
    return cls
