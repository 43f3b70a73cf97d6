"""The kernel alone (tests/kernel/kernel_test.cpp): every variant, with sanitisers, as it is installed, and for Arm by qemu."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from kernels import SOURCES

from nmfx.runtime.kernel.library import FOLDER, variants

TESTS = Path(__file__).parents[1] / "kernel"
X86 = ("avx2", "avx2_vnni", "avx512", "avx512_vnni")
ONLY_X86 = pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="variants of x86-64")


def needed(*programs: str) -> None:
    for one in programs:
        if not shutil.which(one):
            pytest.skip(f"no {one}: apt-get install cmake g++ g++-aarch64-linux-gnu qemu-user")


def has_sanitizer(folder: Path, name: str) -> bool:
    (folder / "none.cpp").write_text("int main() {}")
    command = ["c++", f"-fsanitize={name}", "-o", folder / "none", folder / "none.cpp"]
    return not subprocess.run(command, capture_output=True).returncode and not subprocess.run([folder / "none"]).returncode


def check(folder: Path, name: str, cases: int, *options: str) -> None:
    """Build and run the tests of a variant; skip if this processor cannot run it."""
    if name in X86 and (FOLDER / f"nmfx_kernel_{name}.so").exists() and name not in variants():  # a minute is saved
        pytest.skip(f"this processor cannot run {name}")
    needed("cmake", "ctest", "c++")
    commands = (
        ["cmake", "-S", SOURCES, "-B", folder, "-DNMFX_TESTS=ON", f"-DNMFX_TEST_CASES={cases}", *options],
        ["cmake", "--build", folder, "--target", f"kernel_test_{name}"],
        ["ctest", "--test-dir", folder, "--output-on-failure", "-R", f"^{name}$"],
    )
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        assert not done.returncode, done.stdout[-5000:] + done.stderr[-5000:]
    if "Skipped" in done.stdout:
        pytest.skip(f"this processor cannot run {name}")


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sanitized")
    needed("c++")
    if not has_sanitizer(folder, "address,undefined"):
        pytest.skip("no address and undefined-behaviour sanitisers: install those of the compiler")
    return folder


@ONLY_X86
@pytest.mark.parametrize("name", X86)
def test_results_and_refusals_with_sanitizers(name: str, sanitized: Path) -> None:
    check(sanitized, name, 30, "-DNMFX_SANITIZE=ON")


@pytest.mark.slow
@ONLY_X86
@pytest.mark.parametrize("name", X86)
def test_the_whole_grid_with_sanitizers(name: str, sanitized: Path) -> None:
    check(sanitized, name, 400, "-DNMFX_SANITIZE=ON")


@pytest.mark.slow
@ONLY_X86
@pytest.mark.parametrize("name", X86)
def test_the_whole_grid_as_it_is_installed(name: str, tmp_path: Path) -> None:
    check(tmp_path, name, 2000)


@pytest.mark.slow
@ONLY_X86
def test_threads_do_not_race(tmp_path: Path) -> None:
    needed("c++")
    if not has_sanitizer(tmp_path, "thread"):
        pytest.skip("no thread sanitiser: install that of the compiler")
    check(tmp_path, "avx2", 40, "-DNMFX_SANITIZE=thread")


@pytest.mark.slow
def test_the_whole_grid_on_arm(tmp_path: Path) -> None:
    """Results only: of speed qemu says nothing."""
    needed("aarch64-linux-gnu-g++", "qemu-aarch64")
    check(tmp_path, "neon", 400, f"-DCMAKE_TOOLCHAIN_FILE={TESTS / 'aarch64.cmake'}")
