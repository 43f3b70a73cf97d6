"""The kernel's library: which variant is loaded, its threads, and tensors on their way in and out."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from children import apart

from nmfx.errors import NmfxError
from nmfx.runtime.kernel import library
from nmfx.runtime.kernel.library import FOLDER, Library, NativeProgram, load_kernel, loaded, variants
from nmfx.runtime.operators import OPERATORS

ROOT = Path(__file__).parents[2]
FLATTEN = 5  # its number, checked below


def asked(code: str, **environment: str) -> str:
    """What Python prints, in a process of its own."""
    env = os.environ | {"PYTHONPATH": f"{ROOT}"} | environment
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=200)
    return done.stdout.strip() + done.stderr.strip().rpartition("\n")[2]


def pooled(threads: int) -> torch.Tensor:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        make = torch.Generator().manual_seed(0)
        x = torch.randn(3, 7, 40, 40, generator=make)
        return OPERATORS["max_pool2d"].with_kernel(x, [3, 3], [2, 2], [1, 1])
    finally:
        torch.set_num_threads(before)


def test_the_best_variant_of_this_processor_is_loaded() -> None:
    assert load_kernel() == ""
    assert loaded().name == next(iter(variants()))
    assert loaded().operators["flatten"] == FLATTEN


@pytest.mark.parametrize("name", [path.stem.removeprefix("nmfx_kernel_") for path in sorted(FOLDER.glob("*.so"))])
def test_isa_names_a_variant(name: str) -> None:
    if name not in variants():
        pytest.skip("not on this processor")
    code = "from nmfx.runtime.kernel.library import loaded; print(loaded().name)"
    assert asked(code, NMFX_ISA=name) == name


def test_an_isa_that_is_not_there_is_an_error() -> None:
    said = asked("from nmfx.runtime.kernel.library import load_kernel; load_kernel()", NMFX_ISA="avx1024")
    assert "NMFX_ISA=avx1024: there is no such kernel, only: " in said
    assert loaded().name in said


def test_threads_are_of_openmp_or_its_own() -> None:
    said = asked("from nmfx.runtime.kernel.library import load_kernel; load_kernel()", NMFX_THREADS="3")
    assert "NMFX_THREADS=3: expected openmp or own" in said


def test_a_child_of_fork_computes_on_several_threads() -> None:
    """GNU's OpenMP would wait for threads that the child does not have."""
    wanted = pooled(2)
    assert apart(lambda: torch.equal(pooled(2), wanted))


def test_a_library_that_does_not_load_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nmfx_kernel_avx512.so").write_bytes(b"no library")
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    monkeypatch.setattr(library, "VARIANTS", ("avx512", "own"))
    assert "nmfx_kernel_avx512.so" in apart(lambda: (library._loaded.cache_clear(), load_kernel())[1])
    shutil.copy(loaded().path, tmp_path / "nmfx_kernel_own.so")
    assert apart(lambda: (library._loaded.cache_clear(), load_kernel(), loaded().name)[1:]) == ["", "own"]


def test_a_library_of_another_version_is_refused(tmp_path: Path) -> None:
    old = tmp_path / "old.c"
    old.write_text("int nmfx_supported(void) { return 1; } int nmfx_version(void) { return 0; }")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "nmfx_kernel_old.so", old], check=True)
    with pytest.raises(NmfxError, match="install nmfx anew"):
        Library(tmp_path / "nmfx_kernel_old.so")


def test_own_threads_give_what_openmp_gives() -> None:
    wanted = pooled(1)
    assert torch.equal(pooled(2), wanted)
    try:
        loaded().use_own_threads()
        for threads in (2, 3, 2, 8):
            assert torch.equal(pooled(threads), wanted)
        assert apart(lambda: torch.equal(pooled(2), wanted))  # a child of fork has threads of its own
    finally:
        loaded().use_openmp()


def flatten() -> NativeProgram:
    return NativeProgram(torch.tensor([1, 0, 1, 1, FLATTEN, 0, 0, 1, 1]), [], 1)


def test_what_comes_out_lives_on_its_own() -> None:
    program, x = flatten(), torch.arange(24.0).reshape(2, 3, 4)
    out = program([x.transpose(1, 2)])[0]  # of a copy, since it is not in order
    wanted = x.transpose(1, 2).flatten(1)
    del program, x
    gc.collect()
    assert torch.equal(out, wanted)
    assert not out.requires_grad


def test_constants_are_copies() -> None:
    pick = torch.tensor([[0, 1, -1, 3]], dtype=torch.int32)
    rearrange = loaded().operators["rearrange"]
    program = NativeProgram(torch.tensor([1, 0, 1, 1, rearrange, 0, -2, 2, 2, 2, 1, 0, 1, 1]), [pick], 1)
    pick.fill_(1 << 20)
    assert program([torch.arange(4.0).view(1, 1, 2, 2)])[0].flatten().tolist() == [0, 1, 0, 3]


@pytest.mark.parametrize("wrong", [torch.zeros(2, 3, dtype=torch.float64), torch.zeros([1] * 9), torch.zeros(2, 2).to_sparse(),
                                   torch.empty(2, 2, device="meta")])  # fmt: skip
def test_tensors_of_other_kinds_are_refused(wrong: torch.Tensor) -> None:
    with pytest.raises(RuntimeError, match="expected plain tensors of float32"):
        flatten()([wrong])


def test_memory_that_is_not_there_is_refused() -> None:
    x = torch.zeros(4, 4)
    x.untyped_storage().resize_(8)
    with pytest.raises(RuntimeError, match="whose memory is as large as they say"):
        flatten()([x])


def test_as_many_outputs_as_the_program_has() -> None:
    with pytest.raises(RuntimeError, match="room for 1 outputs, got 2"):
        NativeProgram(torch.tensor([1, 0, 1, 1, FLATTEN, 0, 0, 1, 1]), [], 2)([torch.zeros(2, 2)])
