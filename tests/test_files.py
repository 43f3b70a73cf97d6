"""Laws of writing: a file is there whole, or as it was before."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nmfx.errors import NmfxError
from nmfx.files import write_atomic


def text(content: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(content)


def test_a_new_file_is_written_with_the_folders_it_needs(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "scheme.yaml"
    write_atomic(path, text("new"))
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == ["scheme.yaml"]


def test_an_old_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "scheme.yaml"
    path.write_text("old")
    write_atomic(path, text("new"))
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["scheme.yaml"]


def test_without_force_an_old_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "scheme.yaml"
    path.write_text("old")
    with pytest.raises(NmfxError, match=r"scheme\.yaml exists already"):
        write_atomic(path, text("new"), force=False)
    assert path.read_text() == "old"
    write_atomic(tmp_path / "other.yaml", text("new"), force=False)
    assert (tmp_path / "other.yaml").read_text() == "new"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, MemoryError])
def test_an_interrupted_write_changes_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "scheme.yaml"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("hal")
        raise error

    with pytest.raises(error):
        write_atomic(path, write)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["scheme.yaml"]


def test_a_full_disk_is_an_error_of_ours(tmp_path: Path) -> None:
    def write(temporary: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(NmfxError, match=r"scheme\.yaml: cannot be written: No space left on device"):
        write_atomic(tmp_path / "scheme.yaml", write)
    assert os.listdir(tmp_path) == []


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("a file")
    with pytest.raises(NmfxError, match="cannot be written"):
        write_atomic(tmp_path / "folder" / "scheme.yaml", text("new"))


def test_a_folder_in_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "scheme.yaml").mkdir()
    with pytest.raises(NmfxError, match="cannot be written"):
        write_atomic(tmp_path / "scheme.yaml", text("new"))
    assert os.listdir(tmp_path) == ["scheme.yaml"]


def test_the_writer_sees_the_files_own_name(tmp_path: Path) -> None:
    seen: list[Path] = []

    def write(path: Path) -> None:
        seen.append(path)
        path.touch()

    write_atomic(tmp_path / "model.safetensors", write)
    assert seen[0].name == "model.safetensors"  # writers choose formats by suffix
    assert seen[0].parent.parent == tmp_path  # on one file system, so that renaming is atomic


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o027], ids=oct)
def test_permissions_follow_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_atomic(tmp_path / "scheme.yaml", text("new"))
        assert os.umask(umask) == umask  # and it is left alone
    finally:
        os.umask(before)
    assert (tmp_path / "scheme.yaml").stat().st_mode & 0o777 == 0o666 & ~umask
