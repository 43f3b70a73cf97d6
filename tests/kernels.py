"""Kernels that tests build: for other processors, or with a sanitiser in them."""

from __future__ import annotations

import subprocess
from pathlib import Path

SOURCES = Path(__file__).parents[1] / "nmfx" / "runtime" / "kernel"


def build_kernel(folder: Path, *flags: str) -> Path:
    """A library of the kernel's sources, the only variant in a folder of its own."""
    path = folder / "nmfx_kernel_test.so"
    command = ["c++", "-std=c++20", "-fPIC", "-shared", "-pthread", "-fno-math-errno", *flags, "-o", path]
    subprocess.run([*command, SOURCES / "kernel.cpp", SOURCES / "supported.cpp"], check=True)
    return path


def use_kernel(folder: str) -> str:
    """Python that has a process use that one."""
    return (
        "import pathlib\nfrom nmfx.runtime.kernel import library\n"
        f"library.FOLDER, library.VARIANTS = pathlib.Path({folder!r}), ('test',)\n"
    )
