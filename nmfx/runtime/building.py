"""The kernel in C++: built once by torch.utils.cpp_extension, kept in a cache folder, loaded once a process."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

SOURCES = Path(__file__).with_name("kernel")  # kernel.cpp and the headers it is made of
FLAGS = ("-O3", "-std=c++20", "-fopenmp", "-fno-math-errno")  # -fopenmp: at::parallel_for runs in torch's own threads
NATIVE = "-march=native"
NAME = "nmfx_runtime"
log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where built kernels and measured times are kept: $NMFX_CACHE, or nmfx/ in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("NMFX_CACHE") or Path(base) / "nmfx")


@functools.cache
def processor() -> str:
    """The processor's name and what it can do, as the system gives them."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        wanted = ("model name", "flags", "Features", "CPU part")
        return "; ".join(dict.fromkeys(" ".join(line.split()) for line in lines if line.startswith(wanted)))
    return f"{platform.machine()} {platform.processor()}"


@functools.cache
def identity() -> str:
    """Stands for all that a built kernel depends on: its source, flags, torch, the compiler and the processor."""
    compiler = os.environ.get("CXX", "c++")
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = [compiler, "--version"]
        compiler += subprocess.run(asked, capture_output=True, text=True, timeout=60, check=False).stdout  # noqa: S603
    sources = (path.read_text(encoding="utf-8") for path in sorted(SOURCES.iterdir()))
    parts = (*sources, *flags(), torch.__version__, compiler, processor())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def flags() -> tuple[str, ...]:
    """What the compiler is given; $NMFX_CXXFLAGS, such as ``-march=x86-64-v3``, stands in for this machine's instructions."""
    return (*FLAGS, *shlex.split(os.environ.get("NMFX_CXXFLAGS", NATIVE)))


@functools.cache
def load_kernel() -> str:
    """Load the kernel, built first if the cache has none for this machine; empty when done, or why it cannot be had.

    Without it the operators of `nmfx.runtime` are right but slow. Several processes may build at the same time.
    """
    path = cache_folder() / "kernels" / f"{NAME}-{identity()}.so"
    try:
        if path.exists():
            torch.ops.load_library(path)  # type: ignore[no-untyped-call]
        else:
            _build(path)
    except (RuntimeError, OSError, ImportError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        reason = next((line for line in lines if "error:" in line), lines[0])[:300]
        log.warning("the kernel cannot be built (%s): sparse operators run in plain PyTorch, slowly", reason)
        return reason
    return ""


def _build(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".build.", dir=path.parent))  # its own: a killed build leaves no lock behind
    log.info("building %s", path)
    try:
        with quiet("torch.utils.cpp_extension"):  # it warns of CUDA, which is not asked for
            from torch.utils import cpp_extension

            cpp_extension.load(
                NAME,
                [str(SOURCES / "kernel.cpp")],
                extra_cflags=list(flags()),
                extra_ldflags=[flag for flag in flags() if flag.startswith("-fsanitize")],
                build_directory=str(draft),
                with_cuda=False,
                is_python_module=False,
            )
        os.replace(draft / f"{NAME}.so", path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextlib.contextmanager
def quiet(name: str) -> Iterator[None]:
    """Let a logger of others say nothing."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
