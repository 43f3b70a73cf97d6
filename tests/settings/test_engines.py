"""The one list of engines: what it names is there, and what is not installed is not timed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nmfx.errors import NmfxError
from nmfx.settings.engines import ENGINES
from nmfx.settings.methods import resolve
from nmfx.settings.stages import BenchSettings


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_names_a_function_that_is_there(name: str) -> None:
    assert callable(resolve(ENGINES[name].function))


def test_labels_are_of_one_engine_each() -> None:
    assert len({one.label for one in ENGINES.values()}) == len(ENGINES)


def test_engines_are_timed_where_they_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, one in ENGINES.items():
        packages = ("json",) if name == "openvino" else ("json", "no_such_package")
        monkeypatch.setitem(ENGINES, name, replace(one, packages=packages))
    assert BenchSettings().engine_names == ("openvino",)
    assert BenchSettings(engines="none").engine_names == ()
    assert BenchSettings(engines="onnxruntime,openvino,onnxruntime").engine_names == ("onnxruntime", "openvino")
    with pytest.raises(NmfxError, match="onnxruntime, openvino, onnxruntime-int8, openvino-int8 with commas, or none"):
        BenchSettings(engines="openvino-int4")
