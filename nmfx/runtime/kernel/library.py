"""The kernel's library, called through ctypes (kernel/nmfx_kernel.h): found, loaded once a process, and its programs run.

It is built when nmfx is installed (CMakeLists.txt), in variants for what processors can do. The best that this one can run, and
that is still what was built (kernel/record.py), is loaded; $NMFX_ISA names another. It needs neither a compiler nor a certain
version of torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import platform
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nmfx.errors import NmfxError
from nmfx.runtime.kernel.record import damage_of, digest_of

VERSION, DIMS = 1, 8  # NMFX_VERSION, NMFX_DIMS
FOLDER = Path(__file__).parent / "lib"
VARIANTS = ("avx512_vnni", "avx512", "avx2_vnni", "avx2", "neon")  # the best first
NAMED = frozenset(VARIANTS)  # files whose names say what they were built for
KINDS = {  # DLPack's code and bits
    torch.float32: (2, 32),
    torch.int16: (0, 16),
    torch.int32: (0, 32),
    torch.int64: (0, 64),
    torch.uint8: (1, 8),
    torch.int8: (0, 8),
}
log = logging.getLogger(__name__)


class UnsupportedError(NmfxError):
    """This processor cannot run a variant."""


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class Library:
    """A variant of the kernel.

    Args:
        path: of the library.

    Attributes:
        name: of the variant.
        digest: stands for the content of the file.
        operators: their numbers in programs, by name.
        vector_length: floats of a vector.

    Raises:
        UnsupportedError: this processor cannot run it.
        NmfxError: it is damaged, of another nmfx, or not the variant that its name says.
        OSError: the system cannot load it.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name, content = path, path.stem.removeprefix("nmfx_kernel_"), path.read_bytes()
        digest = digest_of(content)
        if damage := damage_of(path, content, digest):
            raise NmfxError(damage)
        self.digest = digest[:32]
        c = self._c = ctypes.CDLL(str(path))
        if not c.nmfx_supported():
            raise UnsupportedError(f"this processor cannot run the kernel's variant {self.name}")
        if c.nmfx_version() != VERSION:
            raise NmfxError(f"{path} is of another version of nmfx: install nmfx anew")
        c.nmfx_vector_length.restype = ctypes.c_int64
        c.nmfx_operator_name.restype = c.nmfx_error.restype = c.nmfx_variant.restype = ctypes.c_char_p
        c.nmfx_operator_name.argtypes = [ctypes.c_int64]
        number, tensors = ctypes.c_int64, ctypes.POINTER(_DLTensor)
        c.nmfx_program_new.restype, c.nmfx_program_free.restype = ctypes.c_void_p, None
        c.nmfx_program_new.argtypes = [ctypes.c_void_p, number, tensors, number]
        c.nmfx_program_free.argtypes = [ctypes.c_void_p]
        c.nmfx_program_run.argtypes = [ctypes.c_void_p, tensors, number, number, number, ctypes.c_void_p, number]
        c.nmfx_use_openmp.argtypes, c.nmfx_use_openmp.restype = [ctypes.c_void_p] * 3, None
        self.vector_length: int = c.nmfx_vector_length()
        variant: str = c.nmfx_variant().decode()
        if self.name in NAMED and variant not in ("", self.name):
            raise NmfxError(f"{path} is another variant than its name says, {variant}; install nmfx anew")
        self.operators: dict[str, int] = {}
        while name := c.nmfx_operator_name(len(self.operators)):
            self.operators[name.decode()] = len(self.operators)

    def use_openmp(self) -> bool:
        """Share the threads of the OpenMP that torch runs on; false where it has none that is known."""
        for path in (*sorted((Path(torch.__file__).parent / "lib").glob("libgomp*")), None):
            with contextlib.suppress(OSError, AttributeError):
                loaded = ctypes.CDLL(None if path is None else str(path))
                functions = (loaded.GOMP_parallel, loaded.omp_get_thread_num, loaded.omp_get_num_threads)
                self._c.nmfx_use_openmp(*(ctypes.cast(one, ctypes.c_void_p) for one in functions))
                self._openmp = loaded  # stays loaded
                return True
        return False

    def use_own_threads(self) -> None:
        """Share work among threads of the library's own."""
        self._c.nmfx_use_openmp(None, None, None)

    def error(self) -> str:
        """What the last call of this thread that failed had expected."""
        said: bytes = self._c.nmfx_error()
        return said.decode(errors="replace")


class NativeProgram:
    """A program that the kernel holds, with its own copies of the tensors that it names.

    Args:
        numbers: int64 ``(count,)``, as `nmfx.runtime.program.Program` writes them.
        constants: the tensors that they name.
        outputs: how many the program has.

    Raises:
        RuntimeError: a tensor is none that the kernel takes.
    """

    def __init__(self, numbers: Tensor, constants: Sequence[Tensor], outputs: int) -> None:
        self._library = library = loaded()
        if numbers.dtype != torch.int64 or numbers.dim() != 1:
            raise RuntimeError("nmfx runtime: expected a program of int64")
        numbers, kept = numbers.contiguous(), _given(constants)
        self.outputs, c = outputs, library._c
        self._program = c.nmfx_program_new(numbers.data_ptr(), len(numbers), kept, len(constants))
        if not self._program:
            raise RuntimeError(library.error())
        weakref.finalize(self, c.nmfx_program_free, self._program)

    def __deepcopy__(self, memo: dict[int, Any]) -> NativeProgram:
        return self  # nothing changes it

    def __call__(self, inputs: Sequence[Tensor], images: int = 0) -> list[Tensor]:
        """The outputs for these inputs.

        Args:
            images: samples of a pass that stays on one thread; 0 is all at once.

        Raises:
            RuntimeError: naming what was expected.
        """
        given, made = _given(inputs), (ctypes.c_void_p * self.outputs)()
        run = self._library._c.nmfx_program_run
        if run(self._program, given, len(inputs), images, torch.get_num_threads(), made, self.outputs):
            raise RuntimeError(self._library.error())
        return [torch._C._from_dlpack(_capsule(address, b"dltensor", None)) for address in made]  # type: ignore[attr-defined]


_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)


def _given(tensors: Sequence[Tensor]) -> Any:
    """Tensors as the kernel takes them; they must live as long.

    Raises:
        RuntimeError: one is of another kind, or its memory is smaller than it says.
    """
    made = (_DLTensor * len(tensors))()
    for one, t in zip(made, tensors, strict=True):
        kind = KINDS.get(t.dtype)
        if kind is None or t.layout != torch.strided or t.device.type != "cpu" or t.is_neg() or t.dim() > DIMS:
            raise RuntimeError(
                "nmfx runtime: expected plain tensors of float32, int16, int32, int64, uint8 or int8 of up to "
                f"{DIMS} dimensions on the CPU, got {str(t.dtype).removeprefix('torch.')} {list(t.shape)} on {t.device}"
            )
        shape, strides = t.shape, t.stride()
        last = t.storage_offset() + sum((size - 1) * step for size, step in zip(shape, strides, strict=True)) + 1
        if t.numel() and last * t.itemsize > t.untyped_storage().nbytes():
            raise RuntimeError("nmfx runtime: expected tensors whose memory is as large as they say")
        one.data, one.device_type, one.ndim, one.lanes, (one.code, one.bits) = t.data_ptr(), 1, t.dim(), 1, kind
        one.shape, one.strides = (ctypes.c_int64 * t.dim())(*shape), (ctypes.c_int64 * t.dim())(*strides)
    return made


def variants() -> dict[str, Library]:
    """The variants of this installation that this processor can run, by name, the best first."""
    found = {}
    for name in VARIANTS:
        with contextlib.suppress(OSError, AttributeError, NmfxError):
            found[name] = Library(FOLDER / f"nmfx_kernel_{name}.so")
    return found


def load_kernel() -> str:
    """Load the kernel; empty when done, or why it cannot be had and what to do.

    Without it the operators of `nmfx.runtime` are right but slow.

    Raises:
        NmfxError: $NMFX_ISA names a variant that cannot be had, or $NMFX_THREADS neither ``openmp`` nor ``own``.
    """
    return _loaded()[1]


def loaded() -> Library:
    """The kernel, where `load_kernel` says that it is there."""
    library, reason = _loaded()
    if library is None:
        raise NmfxError(reason)
    return library


def kernel_digest() -> str:
    """Stands for the kernel that this process has loaded; empty if it has none."""
    library, _ = _loaded()
    return library.digest if library else ""


@functools.cache
def _loaded() -> tuple[Library | None, str]:
    """The best variant that this processor can run, or why there is none."""
    wanted, reasons, threads = os.environ.get("NMFX_ISA", ""), list[str](), os.environ.get("NMFX_THREADS", "openmp")
    if threads not in ("openmp", "own"):
        raise NmfxError(f"NMFX_THREADS={threads}: expected openmp or own (how many there are is torch.set_num_threads)")
    for name in (wanted,) if wanted else VARIANTS:
        path = FOLDER / f"nmfx_kernel_{name}.so"
        if not path.is_file():
            continue
        try:
            library = Library(path)
        except UnsupportedError as error:
            reasons.append(str(error))
            continue
        except (NmfxError, OSError, AttributeError) as error:
            reasons.append(str(error) if isinstance(error, NmfxError) else f"{path}: {error}; install nmfx anew")
            log.warning("a kernel cannot be loaded: %s", reasons[-1])
            continue
        if threads == "openmp" and library.use_openmp() and hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=library.use_own_threads)  # GNU's OpenMP hangs in a child of fork
        log.info("kernel: %s", path)
        return library, ""
    if wanted:
        there = ", ".join(path.stem.removeprefix("nmfx_kernel_") for path in sorted(FOLDER.glob("*.so"))) or "none"
        raise NmfxError("; ".join(reasons) or f"NMFX_ISA={wanted}: there is no such kernel, only: {there}")
    reason = "; ".join(reasons) or (
        f"nmfx was installed without a kernel for {platform.machine()}: install a wheel of nmfx that has one, or a C++ "
        "compiler, such as g++, and nmfx anew"
    )
    log.warning("no sparse kernel (%s): sparse operators run in plain PyTorch, slowly", reason)
    return None, reason


@functools.cache
def processor() -> str:
    """The processor's name and what it can do, as the system gives them."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        wanted = ("model name", "flags", "Features", "CPU part")
        return "; ".join(dict.fromkeys(" ".join(line.split()) for line in lines if line.startswith(wanted)))
    return f"{platform.machine()} {platform.processor()}"


@contextlib.contextmanager
def quiet(name: str) -> Iterator[None]:
    """Silence a logger of another library within a ``with`` block."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
