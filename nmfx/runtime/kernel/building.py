"""The kernel in C++: built once by torch.utils.cpp_extension, kept in a cache folder, loaded once a process.

The name of a kept kernel says what it was built from, by which compiler, and the digest of its bytes. It is loaded only if its
bytes have this digest and nobody but this user and root could have written them; then from a copy in memory, so that whatever
happens to the file does not matter.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

from nmfx.errors import NmfxError
from nmfx.files.atomic import draft_in, write_atomic
from nmfx.files.drafts import locked
from nmfx.runtime.kernel.trust import digest_of, make_folder, read_trusted
from nmfx.runtime.operators import header

SOURCES = Path(__file__).parent  # kernel.cpp and the headers it is made of, but for one
TABLE = "table.h"  # which is written beside the build
FLAGS = ("-O3", "-std=c++20", "-fopenmp", "-fno-math-errno")  # -fopenmp: at::parallel_for runs in torch's own threads
NATIVE = "-march=native"
NAME = "nmfx_runtime"
PATIENCE = 900  # seconds to wait for another process that builds; then this one builds as well
log = logging.getLogger(__name__)
_once = threading.Lock()
_in_process: list[str] = []  # the digest of the kernel that is loaded


def cache_folder() -> Path:
    """Where built kernels and measured times are kept: $NMFX_CACHE, or nmfx/ in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("NMFX_CACHE") or Path(base) / "nmfx")


def folders() -> list[Path]:
    """Where kernels may lie: in the cache, and where that cannot be used, in a folder of this user's among temporary files."""
    user = os.geteuid() if hasattr(os, "geteuid") else "user"
    return [cache_folder() / "kernels", Path(tempfile.gettempdir()) / f"nmfx-{user}" / "kernels"]


@functools.cache
def processor() -> str:
    """The processor's name and what it can do, as the system gives them."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        wanted = ("model name", "flags", "Features", "CPU part")
        return "; ".join(dict.fromkeys(" ".join(line.split()) for line in lines if line.startswith(wanted)))
    return f"{platform.machine()} {platform.processor()}"


@functools.cache
def compiler() -> str:
    """The C++ compiler and its version; empty where there is none."""
    name = os.environ.get("CXX") or "c++"
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
        asked = [*shlex.split(name), "--version"]
        said = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=True)  # noqa: S603
        return f"{name} {said.stdout}"
    return ""


@functools.cache
def identity() -> str:
    """Stands for all that a kernel must be built for to run here: its source, flags, torch and the processor.

    The compiler is not among them: where there is none, a kernel that one has built elsewhere is as good.
    """
    sources = (path.read_text(encoding="utf-8") for path in sorted(SOURCES.iterdir()) if path.suffix in (".cpp", ".h"))
    machine = processor() if any("native" in flag for flag in flags()) else platform.machine()
    return digest_of("\0".join((*sources, header(), *flags(), torch.__version__, machine)).encode())[:16]


def flags() -> tuple[str, ...]:
    """What the compiler is given; $NMFX_CXXFLAGS, such as ``-march=x86-64-v3``, stands in for this machine's instructions."""
    return (*FLAGS, *shlex.split(os.environ.get("NMFX_CXXFLAGS", NATIVE)))


def load_kernel() -> str:
    """Load the kernel, built first if the cache has none for this machine; empty when done, or why it cannot be had and what
    to do.

    Without it the operators of `nmfx.runtime` are right but slow. Of several processes one builds and the others wait for it.
    """
    return _loaded()[0]


def kernel_digest() -> str:
    """Stands for the kernel that this process has loaded; empty if it has none."""
    return _loaded()[1]


def _loaded() -> tuple[str, str]:
    with _once:
        return _load_once()


@functools.cache
def _load_once() -> tuple[str, str]:
    """Why there is no kernel, and the digest of the one that there is: this compiler's from the cache, or a new one, or any."""
    reasons = list[str]()
    for way in (_load_kept, _load_built, functools.partial(_load_kept, builder="*")):
        if digest := way(reasons):
            return "", digest
    reason = "; ".join(dict.fromkeys(reasons))
    log.warning("no sparse kernel (%s): sparse operators run in plain PyTorch, slowly", reason)
    return reason, ""


def _load_kept(reasons: list[str], builder: str | None = None) -> str:
    """Load a kernel that is kept on disk, of this compiler unless another is named; its digest, empty if there is none."""
    builder = _builder() if builder is None else builder
    for folder in folders():
        for path in sorted(folder.glob(f"{NAME}-{identity()}-{builder}-*.so")) if builder else ():
            try:
                content = read_trusted(path)
                _load(content, path)
            except (OSError, NmfxError) as error:
                reasons.append(_brief(error))
                log.info("not loaded: %s", error)
            else:
                return digest_of(content)
    return ""


def _load_built(reasons: list[str]) -> str:
    """Build a kernel, unless another process has done so meanwhile, and load it; its digest, empty if it cannot be done."""
    if not compiler():
        name = os.environ.get("CXX") or "c++"
        reasons.append(f"no C++ compiler ({name}): install one, such as g++, or set CXX to it")
        return ""
    for folder in folders():
        try:
            make_folder(folder)
        except (OSError, NmfxError) as error:
            reasons.append(_brief(error))
            continue
        with locked(folder / ".lock", PATIENCE):
            if digest := _load_kept([]):
                return digest
            _remove_damaged(folder)
            try:
                return _build(folder)
            except (RuntimeError, OSError, ImportError, NmfxError, subprocess.SubprocessError) as error:
                reasons.append(f"it cannot be built: {_brief(error)}")
                return ""
    return ""


def _build(folder: Path) -> str:
    """Build and load; what is kept is a copy, since the file that a process has loaded must not change.

    Raises:
        NmfxError: the process has a kernel already (see `_load`): torch loads what it builds.
    """
    if _in_process:
        raise NmfxError("this process has loaded another kernel already")
    log.info("building a kernel in %s", folder)
    with draft_in(folder) as draft, _quiet_build():
        from torch.utils import cpp_extension

        (draft / TABLE).write_text(header(), encoding="utf-8")
        cpp_extension.load(
            NAME,
            [str(SOURCES / "kernel.cpp")],
            extra_cflags=list(flags()),
            extra_include_paths=[str(draft)],
            extra_ldflags=[flag for flag in flags() if flag.startswith("-fsanitize")],
            build_directory=str(draft),
            with_cuda=False,
            is_python_module=False,
        )
        content = next(draft.glob(f"{NAME}*.so")).read_bytes()
    _in_process.append(digest_of(content))
    path = folder / f"{NAME}-{identity()}-{_builder()}-{digest_of(content)}.so"
    try:
        write_atomic(path, lambda new: new.write_bytes(content), mode=0o644)
    except NmfxError as error:  # it is loaded all the same
        log.warning("the kernel is not kept: %s", error)
    return digest_of(content)


def _remove_damaged(folder: Path) -> None:
    """Remove kernels for this machine that cannot be what their names say."""
    for path in folder.glob(f"{NAME}-{identity()}-*.so"):
        with contextlib.suppress(OSError):
            if not path.is_symlink() and path.is_file() and digest_of(path.read_bytes()) != path.stem.rpartition("-")[2]:
                path.unlink()


def _load(content: bytes, path: Path) -> None:
    """Load these bytes as a library; from memory where the system can, so that no file can change under the process.

    Raises:
        NmfxError: the process has another kernel already: torch ends it where operators are registered twice.
    """
    if _in_process:
        if _in_process != [digest_of(content)]:
            raise NmfxError(f"{path}: this process has loaded another kernel already")
        return
    try:
        memory = os.memfd_create(NAME)  # stays open: the loader knows libraries by name, and this number must not name another
        with open(memory, "wb", closefd=False) as file:
            file.write(content)
        ctypes.CDLL(f"/proc/self/fd/{memory}")
    except (AttributeError, OSError):  # not Linux, or nothing may be run from memory
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    _in_process.append(digest_of(content))


@contextlib.contextmanager
def _quiet_build() -> Iterator[None]:
    """Silence torch's warnings of CUDA, which is not asked for, and add this Python's ninja to a PATH that has none."""
    before = os.environ.get("PATH", "")
    with contextlib.suppress(ImportError):
        if shutil.which("ninja") is None:
            import ninja

            os.environ["PATH"] = os.pathsep.join((ninja.BIN_DIR, before))
    try:
        with quiet("torch.utils.cpp_extension"):
            yield
    finally:
        os.environ["PATH"] = before


def _builder() -> str:
    return digest_of(compiler().encode())[:8] if compiler() else ""


def _brief(error: BaseException) -> str:
    """The line of an error that says why."""
    lines = str(error).splitlines() or [type(error).__name__]
    return next((line for line in lines if "error:" in line), lines[0])[:300]


@contextlib.contextmanager
def quiet(name: str) -> Iterator[None]:
    """Silence a logger of another library within a ``with`` block."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
