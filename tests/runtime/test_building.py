"""Laws of the kernel's cache: what is loaded is what was built, by us; one builds, and whoever dies leaves nothing behind."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from children import Answer, apart, forked

from nmfx.errors import NmfxError
from nmfx.files.atomic import draft_in
from nmfx.runtime.kernel import building

SOURCE = 'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n'
EVIL = (
    '#include <cstdio>\nstatic int ran = (std::fclose(std::fopen("{}", "w")), 1);\nextern "C" int answer() {{ return ran; }}\n'
)
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
OTHER = 12345  # another user


def forget() -> None:
    for function in (building.compiler, building.identity, building._load_once):
        function.cache_clear()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kernel that is quickly built."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "kernel.cpp").write_text(SOURCE)
    with building.quiet("torch.utils.cpp_extension"):
        import torch.utils.cpp_extension  # noqa: F401 - once, not in every child
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, an empty folder for temporary files, and that kernel."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(building, "SOURCES", source)
    monkeypatch.setattr(building.tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("NMFX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("NMFX_CXXFLAGS", raising=False)
    monkeypatch.setattr(building, "FLAGS", ("-O0",))
    monkeypatch.setattr(building, "_in_process", [])  # tests before this one may have loaded nmfx's own; children load this one
    forget()
    yield tmp_path / "cache"
    forget()


@pytest.fixture(scope="module")
def content(source: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Bytes of the kernel, once built."""
    path = tmp_path_factory.mktemp("content") / "kernel.so"
    subprocess.run(["c++", "-shared", "-fPIC", "-o", path, source / "kernel.cpp"], check=True)
    return path.read_bytes()


def name_of(content: bytes, builder: str = "") -> str:
    return (
        f"{building.NAME}-{building.identity()}-{builder or building._builder()}-{hashlib.sha256(content).hexdigest()[:32]}.so"
    )


@pytest.fixture
def kept(cache: Path, content: bytes) -> Path:
    """A good kernel in the cache."""
    (cache / "kernels").mkdir(parents=True, mode=0o755)
    path = cache / "kernels" / name_of(content)
    path.write_bytes(content)
    path.chmod(0o644)
    return path


def kernels(cache: Path) -> list[Path]:
    return sorted((cache / "kernels").glob("*.so"))


def without_building() -> str:
    """Load the kernel where none can be built."""
    os.environ["CXX"] = "/nowhere/c++"
    forget()
    return building.load_kernel()


def test_it_is_built_once_and_then_loaded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(0)  # whatever that is, others cannot write what is kept
    try:
        assert apart(building.load_kernel) == ""
    finally:
        os.umask(before)
    (path,) = kernels(cache)
    assert [one.stat().st_mode & 0o777 for one in (cache, path.parent, path)] == [0o755, 0o755, 0o644]
    assert {one.name for one in path.parent.iterdir()} == {".lock", path.name}
    monkeypatch.setattr(building, "_build", lambda folder: pytest.fail("built again"))
    assert apart(lambda: [building.load_kernel(), building.kernel_digest()]) == ["", path.stem[-32:]]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: content[:64],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: b"\0" * len(content),
        lambda content: content[:5000] + bytes([content[5000] ^ 1]) + content[5001:],
        lambda content: b"#!/bin/sh\n",
    ],
    ids=["empty", "half", "header", "a byte less", "a byte more", "zeros", "a bit", "a script"],
)
def test_a_damaged_one_is_built_anew(damage: Callable[[bytes], bytes], kept: Path, cache: Path, content: bytes) -> None:
    kept.write_bytes(damage(content))
    kept.with_name("notes.txt").write_text("of the user")
    assert "is damaged" in apart(without_building)
    assert apart(building.load_kernel) == ""
    for path in kernels(cache):
        assert building.read_trusted(path)
    assert apart(without_building) == ""
    assert kept.with_name("notes.txt").exists()


@pytest.mark.parametrize("by", ["built", "kept"])
def test_what_is_loaded_does_not_change_with_the_file(by: str, cache: Path, request: pytest.FixtureRequest) -> None:
    if by == "kept":
        request.getfixturevalue("kept")

    def work() -> int:
        loaded = list[ctypes.CDLL]()
        real = ctypes.CDLL
        ctypes.CDLL = lambda name, *a: loaded.append(real(name, *a))  # type: ignore[assignment,misc]
        assert building.load_kernel() == ""
        for path in kernels(cache):
            os.truncate(path, 0)  # SIGBUS for whoever has mapped it
        return loaded[-1].answer()

    assert apart(work) == 42


@pytest.fixture
def evil(tmp_path: Path) -> tuple[bytes, Path]:
    """A library that makes a file as soon as it is loaded."""
    ran, path = tmp_path / "it ran", tmp_path / "evil.so"
    (tmp_path / "evil.cpp").write_text(EVIL.format(ran))
    subprocess.run(["c++", "-shared", "-fPIC", "-o", path, tmp_path / "evil.cpp"], check=True)
    return path.read_bytes(), ran


MEANS: dict[str, Callable[[Path], object]] = {
    "another user's file": lambda path: os.chown(path, OTHER, OTHER),
    "another user's folder": lambda path: os.chown(path.parent, OTHER, OTHER),
    "another user's cache": lambda path: os.chown(path.parent.parent, OTHER, OTHER),
    "a file for all": lambda path: path.chmod(0o666),
    "a file for a group": lambda path: path.chmod(0o664),
    "a folder for all": lambda path: path.parent.chmod(0o777),
    "a folder as /tmp is": lambda path: path.parent.chmod(0o1777),
    "a folder for a group": lambda path: path.parent.chmod(0o775),
    "a cache for all": lambda path: path.parent.parent.chmod(0o777),
    "a link": lambda path: (path.rename(path.with_name("x")), path.symlink_to(path.with_name("x"))),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "another user's link to the folder": lambda path: (
        path.parent.rename(path.parents[2] / "elsewhere"),
        path.parent.symlink_to(path.parents[2] / "elsewhere"),
        os.lchown(path.parent, OTHER, OTHER),
    ),
    "a link to a folder for all": lambda path: (
        path.parent.rename(path.parents[2] / "elsewhere"),
        path.parent.symlink_to(path.parents[2] / "elsewhere"),
        (path.parents[2] / "elsewhere").chmod(0o777),
    ),
}


@as_root
@pytest.mark.parametrize("means", MEANS)
def test_what_others_could_have_written_is_not_loaded(means: str, cache: Path, evil: tuple[bytes, Path]) -> None:
    library, ran = evil
    (cache / "kernels").mkdir(parents=True, mode=0o755)
    path = cache / "kernels" / name_of(library)
    path.write_bytes(library)
    path.chmod(0o644)
    MEANS[means](path)
    reason = apart(without_building)
    assert str(cache) in reason
    assert "no C++ compiler (/nowhere/c++): install one" in reason
    assert apart(building.load_kernel) == ""  # built beside it, or among temporary files
    assert apart(building.load_kernel) == ""
    assert not ran.exists()
    if means == "another user's cache":
        assert "belongs to another user (12345)" in reason
        assert "set NMFX_CACHE" in reason
        assert list((cache.parent / "tmp").glob(f"nmfx-{os.geteuid()}/kernels/*.so"))


@as_root
def test_nor_from_a_folder_that_another_user_has_made_among_temporary_files(cache: Path, evil: tuple[bytes, Path]) -> None:
    library, ran = evil
    cache.mkdir(mode=0o777)
    cache.chmod(0o777)
    path = cache.parent / "tmp" / f"nmfx-{os.geteuid()}" / "kernels" / name_of(library)
    path.parent.mkdir(parents=True)
    path.write_bytes(library)
    os.chown(path.parent.parent, OTHER, OTHER)
    reason = apart(building.load_kernel)
    assert "can be written by others" in reason
    assert "belongs to another user" in reason
    assert not ran.exists()


def test_a_link_of_ours_leads_to_a_folder_of_ours(kept: Path, cache: Path) -> None:
    cache.rename(cache.with_name("elsewhere"))
    cache.symlink_to(cache.with_name("elsewhere"))
    assert apart(without_building) == ""


def test_without_a_compiler_that_of_another_is_loaded(kept: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    kept.rename(kept.with_name(name_of(content, "0a1b2c3d")))
    assert apart(without_building) == ""
    monkeypatch.setattr(building, "_build", lambda folder: (_ for _ in ()).throw(RuntimeError("no ninja")))
    assert apart(building.load_kernel) == ""  # nor where building fails


@pytest.mark.parametrize("what", ["source", "table", "flags", "torch", "processor"])
def test_what_was_built_for_something_else_is_not(
    what: str, kept: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if what == "source":
        (tmp_path / "kernel.cpp").write_text(SOURCE + "\n")
        monkeypatch.setattr(building, "SOURCES", tmp_path)
    elif what == "table":
        monkeypatch.setattr(building, "header", lambda: "other operators")
    elif what == "flags":
        monkeypatch.setenv("NMFX_CXXFLAGS", "-O1 -march=native")
    elif what == "torch":
        monkeypatch.setattr(building.torch, "__version__", "2.0.0")
    else:
        monkeypatch.setattr(building, "processor", lambda: "of another machine")
    assert "no C++ compiler" in apart(without_building)


def test_a_portable_one_fits_other_processors(content: bytes, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NMFX_CXXFLAGS", "")
    (cache / "kernels").mkdir(parents=True, mode=0o755)
    (cache / "kernels" / name_of(content)).write_bytes(content)
    monkeypatch.setattr(building, "processor", lambda: "of another machine")
    assert apart(without_building) == ""


def test_one_builds_and_the_others_wait(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = building._build

    def counted(folder: Path) -> str:
        with open(tmp_path / "built", "a") as file:
            file.write("x")
        return real(folder)

    monkeypatch.setattr(building, "_build", counted)
    assert [one.get() for one in [Answer(building.load_kernel) for _ in range(5)]] == [""] * 5
    assert (tmp_path / "built").read_text() == "x"
    assert len(kernels(cache)) == 1


def builder_that_never_ends(cache: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The number of a process that is in the middle of a build."""

    def endless(folder: Path) -> str:
        with draft_in(folder) as draft:
            (draft / "kernel.o").write_text("half")
            time.sleep(600)
        return ""

    with monkeypatch.context() as patch:
        patch.setattr(building, "_build", endless)
        child = forked(building.load_kernel)
    while not list(cache.glob("kernels/.nmfx-draft-*/new/kernel.o")):
        time.sleep(0.02)
    return child


def test_whoever_waits_takes_over_from_a_builder_that_dies(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = builder_that_never_ends(cache, monkeypatch)
    waiting = Answer(building.load_kernel)
    time.sleep(0.3)
    assert not kernels(cache)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert waiting.get() == ""
    assert {one.name for one in (cache / "kernels").iterdir()} == {".lock", kernels(cache)[0].name}


def test_patience_with_a_living_builder_ends(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = builder_that_never_ends(cache, monkeypatch)
    monkeypatch.setattr(building, "PATIENCE", 0.2)
    try:
        assert apart(building.load_kernel) == ""
        assert len(list(cache.glob("kernels/.nmfx-draft-*/new/kernel.o"))) == 1  # it is not disturbed
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_cache_that_is_full_keeps_nothing_and_all_goes_on(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise NmfxError("No space left on device")

    monkeypatch.setattr(building, "write_atomic", full)
    assert apart(building.load_kernel) == ""
    assert not kernels(cache)


def test_source_that_does_not_compile_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernel.cpp").write_text("int answer() { return nowhere; }\n")
    monkeypatch.setattr(building, "SOURCES", tmp_path)
    reason = apart(building.load_kernel)
    assert "it cannot be built" in reason
    assert "kernel.cpp:1:23: error:" in reason


def test_the_ninja_of_this_python_is_found(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ninja")
    for tool in ("c++", "g++", "ld", "as", "sh", "which", "uname", "ldconfig"):
        if found := shutil.which(tool):
            (tmp_path / "bin").mkdir(exist_ok=True)
            (tmp_path / "bin" / tool).symlink_to(found)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert apart(lambda: [building.load_kernel(), os.environ["PATH"]]) == ["", str(tmp_path / "bin")]


def test_a_process_has_one_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Torch ends a process that registers operators twice, as a kernel loaded once more from other memory would."""
    loaded: list[str] = []
    monkeypatch.setattr(building, "_in_process", [])
    monkeypatch.setattr(building.ctypes, "CDLL", loaded.append)
    for _ in range(2):
        building._load(b"one", tmp_path / "one.so")
    assert len(loaded) == 1
    with pytest.raises(NmfxError, match="another kernel"):
        building._load(b"another", tmp_path / "another.so")
    assert len(loaded) == 1


def test_a_kernel_that_was_built_counts_as_loaded(cache: Path) -> None:
    """Torch loads what it builds: loading it once more, from the cache, would end the process."""

    def twice() -> list[Any]:
        said: list[Any] = [building.load_kernel(), building._in_process == [building.kernel_digest()]]
        forget()
        said.append(building.load_kernel())  # from the cache
        shutil.rmtree(cache)
        forget()
        return [*said, building.load_kernel()]  # nothing is built over it

    *loaded, refused = apart(twice)
    assert loaded == ["", True, ""]
    assert "this process has loaded another kernel already" in refused
