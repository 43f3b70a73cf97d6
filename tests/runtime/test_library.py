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
from torch import nn

import nmfx
from nmfx.errors import NmfxError
from nmfx.runtime.kernel import library, record
from nmfx.runtime.kernel.library import FOLDER, VARIANTS, Library, NativeProgram, load_kernel, loaded, variants
from nmfx.runtime.kernel.record import RECORD, write_record
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


def said_of(content: bytes, folder: Path, name: str = "avx512", *, recorded: bool = False) -> str:
    """What a process of its own says that it has no kernel for, if its only one has this content; empty if it has one."""
    path = folder / f"nmfx_kernel_{name}.so"
    if recorded:
        shutil.copy(loaded().path, path)
        write_record(folder)
    path.write_bytes(content)
    return str(apart(lambda: with_kernels_of(folder)))


def with_kernels_of(folder: Path) -> str:
    library.FOLDER = folder
    library._loaded.cache_clear()
    return load_kernel()


@pytest.mark.parametrize("recorded", [True, False])
def test_a_library_that_is_cut_short_is_refused(recorded: bool, tmp_path: Path) -> None:
    """It would end the process by SIGBUS."""
    content = loaded().path.read_bytes()
    for length in (0, 4, 63, 64, 4096, *(len(content) * part // 100 for part in (10, 50, 90)), len(content) - 1):
        said = said_of(content[:length], tmp_path, recorded=recorded)
        assert "nmfx_kernel_avx512.so" in said
        assert "install nmfx anew" in said


def test_a_library_that_was_altered_is_refused(tmp_path: Path) -> None:
    content = loaded().path.read_bytes()
    altered = [
        content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :] for at in (70, len(content) // 2, len(content) - 1)
    ]
    for one in (*altered, bytes(len(content)), content + b"more"):
        said = said_of(one, tmp_path, recorded=True)
        assert f"{tmp_path}/nmfx_kernel_avx512.so is damaged: not what SHA256SUMS beside it says; install nmfx anew" in said
    assert said_of(content, tmp_path, loaded().name, recorded=True) == ""


def test_a_variant_under_the_name_of_another_is_refused(tmp_path: Path) -> None:
    for name in VARIANTS:
        said = said_of(loaded().path.read_bytes(), tmp_path, name)
        assert bool(said) == (name != loaded().name)
        assert (f"nmfx_kernel_{name}.so is another variant than its name says" in said) == bool(said)
        (tmp_path / f"nmfx_kernel_{name}.so").unlink()


def test_a_damaged_kernel_costs_speed_only(tmp_path: Path) -> None:
    (tmp_path / loaded().path.name).write_bytes(loaded().path.read_bytes()[:-1])

    def right() -> bool:
        assert "cut short" in with_kernels_of(tmp_path)
        x = torch.randn(2, 32)
        model = nmfx.transform(nn.Sequential(nn.Linear(32, 8)), "2:16", example_input=x).eval()
        with torch.no_grad():
            return torch.allclose(nmfx.compile(model, x)(x), model(x), atol=1e-5)

    assert apart(right)


def test_the_next_best_takes_the_place_of_a_damaged_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = loaded().path.read_bytes()
    (tmp_path / "nmfx_kernel_own.so").write_bytes(good)
    (tmp_path / "nmfx_kernel_bad.so").write_bytes(good[:-100])
    code = (
        "import logging, pathlib; logging.basicConfig(format='%(levelname)s %(message)s')\n"
        "from nmfx.runtime.kernel import library\n"
        f"library.FOLDER, library.VARIANTS = pathlib.Path({str(tmp_path)!r}), ('bad', 'own')\n"
        "print(library.loaded().name)"
    )
    said = asked(code)
    assert said.startswith("own")
    assert "WARNING a kernel cannot be loaded" in said
    assert "nmfx_kernel_bad.so is damaged: cut short; install nmfx anew" in said
    said = asked(code, NMFX_ISA="bad")
    assert "nmfx.errors.NmfxError" in said
    assert "nmfx_kernel_bad.so is damaged" in said


def test_what_builds_a_kernel_records_it(tmp_path: Path) -> None:
    """As hatch_build.py and make kernel do, without a package."""
    for name in ("nmfx_kernel_a.so", "nmfx_kernel_b.so"):
        (tmp_path / name).write_bytes(name.encode())
    subprocess.run([sys.executable, "-I", "-S", Path(record.__file__), tmp_path], check=True)
    subprocess.run(["sha256sum", "--check", "--strict", RECORD], cwd=tmp_path, check=True, capture_output=True)
    assert [line.split()[1] for line in (tmp_path / RECORD).read_text().splitlines()] == [
        "nmfx_kernel_a.so",
        "nmfx_kernel_b.so",
    ]
    for builder in ("hatch_build.py", "Makefile"):
        assert "record.py" in (ROOT / builder).read_text()


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
