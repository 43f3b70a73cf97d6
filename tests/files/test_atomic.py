"""Laws of writing: a file is there whole, or as it was before."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from children import forked

from nmfx.errors import NmfxError
from nmfx.files import atomic as files
from nmfx.files import drafts
from nmfx.files.atomic import all_or_nothing, draft_in, replace_folder, write_atomic
from nmfx.files.drafts import DRAFT, MARK, NEW, locked, remove_dead_drafts
from nmfx.stages.work import find_work


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
    assert tmp_path in seen[0].parents  # on one file system, so that renaming is atomic


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o027], ids=oct)
def test_permissions_follow_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_atomic(tmp_path / "scheme.yaml", text("new"))
        assert os.umask(umask) == umask  # and it is left alone
    finally:
        os.umask(before)
    assert (tmp_path / "scheme.yaml").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_mode_is_never_wider_than_asked_for(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write_atomic(tmp_path / "kernel.so", text("new"), mode=0o644)
    finally:
        os.umask(before)
    assert (tmp_path / "kernel.so").stat().st_mode & 0o777 == 0o644


def survived(work: Callable[[], object], line: int) -> bool:
    """`work` in a process killed before the `line`-th line of atomic.py and drafts.py; whether it ended before that."""
    left = [line]

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in (files.__file__, drafts.__file__):
            return None
        if event == "line":
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    def traced() -> None:
        sys.settrace(trace)
        work()

    _, status = os.waitpid(forked(traced), 0)
    assert os.WIFSIGNALED(status) or not os.WEXITSTATUS(status)
    return not os.WIFSIGNALED(status)


def every_kill(work: Callable[[], object], law: Callable[[], None], step: int = 3) -> None:
    """The law holds after `work` was killed at any line."""
    for line in range(1, 5000, step):
        done = survived(work, line)
        law()
        if done:
            return
    raise AssertionError("it never ended")


def test_a_write_killed_anywhere_leaves_a_whole_file_and_the_next_one_no_draft(tmp_path: Path) -> None:
    path, seen = tmp_path / "scheme.yaml", set[str]()

    def law() -> None:
        seen.add(path.read_text())
        write_atomic(tmp_path / "other.yaml", text("other"))
        assert sorted(os.listdir(tmp_path)) == ["other.yaml", "scheme.yaml"]
        path.write_text("old")

    path.write_text("old")
    every_kill(lambda: write_atomic(path, text("new")), law)
    assert seen == {"old", "new"}


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_replaced_at_once_whenever_the_process_is_killed(
    exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, seen = tmp_path / "digits.nmfx", set[str]()
    if not exchange:
        monkeypatch.setattr(files, "_exchanged", lambda one, other: False)

    def write(draft: Path) -> None:
        for name in ("a", "b"):
            (draft / name).write_text("new")

    def law() -> None:
        assert folder.exists() or not exchange
        remove_dead_drafts(tmp_path)
        assert os.listdir(tmp_path) == ["digits.nmfx"]
        found = {(folder / name).read_text() for name in ("a", "b")}
        assert len(found) == 1
        seen.update(found)
        (folder / "a").write_text("old")
        (folder / "b").write_text("old")

    folder.mkdir()
    write(folder)
    every_kill(lambda: replace_folder(folder, write), law)
    assert seen == {"old", "new"}


def test_opening_a_work_directory_puts_back_what_a_killed_conversion_took_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "digits.nmfx"

    def killed() -> None:
        real = os.rename
        monkeypatch.setattr(files, "_exchanged", lambda one, other: False)
        monkeypatch.setattr(os, "rename", lambda a, b: real(a, b) if a == folder else os.kill(os.getpid(), signal.SIGKILL))
        replace_folder(folder, lambda draft: (draft / "work.yaml").write_text("new"))

    folder.mkdir()
    (folder / "work.yaml").write_text("nmfx: work\nversion: 1\nmodel: demo:digits\nweights: random\n")
    _, status = os.waitpid(forked(killed), 0)
    assert os.WIFSIGNALED(status)
    assert not folder.exists()
    found = find_work(str(folder))
    assert found is not None
    assert found.model == "demo:digits"
    assert os.listdir(tmp_path) == ["digits.nmfx"]


def test_several_files_killed_anywhere_are_each_whole(tmp_path: Path) -> None:
    folder = tmp_path / "export"

    def work() -> None:
        with all_or_nothing(folder) as draft:
            for name in ("a", "b"):
                (draft / name).write_text("new")

    def law() -> None:
        folder.mkdir(exist_ok=True)
        remove_dead_drafts(folder)
        assert {(folder / name).read_text() for name in os.listdir(folder)} <= {"old", "new"}
        assert set(os.listdir(folder)) <= {"a", "b"}
        (folder / "a").write_text("old")

    every_kill(work, law)


def test_a_dead_process_that_swept_leaves_nothing_to_the_next(tmp_path: Path) -> None:
    def leave_a_draft() -> None:
        survived(lambda: write_atomic(tmp_path / "a", lambda _: os.kill(os.getpid(), signal.SIGKILL)), 5000)

    def law() -> None:
        remove_dead_drafts(tmp_path)
        assert os.listdir(tmp_path) == []
        leave_a_draft()

    leave_a_draft()
    assert len(os.listdir(tmp_path)) == 1
    every_kill(lambda: remove_dead_drafts(tmp_path), law)


def test_the_draft_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    read, write = os.pipe()
    stop_read, stop_write = os.pipe()

    def work() -> None:
        with draft_in(tmp_path) as draft:
            (draft / "half").write_text("half")
            os.write(write, b"x")
            os.read(stop_read, 1)
            assert (draft / "half").read_text() == "half"

    child = forked(work)
    os.read(read, 1)
    before = sorted(tmp_path.rglob("*"))
    remove_dead_drafts(tmp_path)
    write_atomic(tmp_path / "other", text("other"))
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "other"])
    os.write(stop_write, b"x")
    assert os.waitpid(child, 0)[1] == 0
    assert os.listdir(tmp_path) == ["other"]


def test_writers_beside_one_another_never_take_a_draft_for_dead(tmp_path: Path) -> None:
    def work(mine: str) -> None:
        for number in range(60):
            write_atomic(tmp_path / mine, text(f"{mine} {number}"))

    children = [forked(lambda mine=mine: work(mine)) for mine in "abcd"]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert {name: (tmp_path / name).read_text() for name in os.listdir(tmp_path)} == {name: f"{name} 59" for name in "abcd"}


FOREIGN = [None, b"", b"mine", b"[]", b'{"made by": "me"}', b'{"made by": "nmfx"}', b"9" * 5000, "link", "pipe"]


@pytest.mark.parametrize("mark", FOREIGN)
def test_what_nmfx_did_not_make_stays(mark: bytes | str | None, tmp_path: Path) -> None:
    theirs = tmp_path / f"{DRAFT}mine"
    (theirs / NEW).mkdir(parents=True)
    (theirs / NEW / "thesis.tex").write_text("my life")
    (tmp_path / f"{DRAFT}file").write_text("a file")
    if isinstance(mark, bytes):
        (theirs / MARK).write_bytes(mark)
    elif mark == "link":
        (tmp_path / "true").write_text(json.dumps({"made by": "nmfx", "replaces": ""}))
        (theirs / MARK).symlink_to(tmp_path / "true")
    elif mark == "pipe":
        os.mkfifo(theirs / MARK)
    remove_dead_drafts(tmp_path)
    assert (theirs / NEW / "thesis.tex").read_text() == "my life"
    assert (tmp_path / f"{DRAFT}file").exists()


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "..", ".", 3, None, "a/b"])
def test_a_mark_puts_nothing_back_elsewhere(name: Any, tmp_path: Path) -> None:
    draft = tmp_path / "here" / f"{DRAFT}x"
    (draft / "old").mkdir(parents=True)
    (draft / MARK).write_text(json.dumps({"made by": "nmfx", "replaces": name}))
    remove_dead_drafts(tmp_path / "here")
    assert os.listdir(tmp_path) == ["here"]
    assert (draft / "old").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_drafts_of_other_users_stay(tmp_path: Path) -> None:
    survived(lambda: write_atomic(tmp_path / "a", lambda _: os.kill(os.getpid(), signal.SIGKILL)), 5000)
    (draft,) = tmp_path.iterdir()
    os.chown(draft / MARK, 1234, 1234)
    remove_dead_drafts(tmp_path)
    assert draft.exists()
    os.chown(draft / MARK, 0, 0)
    remove_dead_drafts(tmp_path)
    assert not draft.exists()


def test_what_a_link_in_a_draft_leads_to_stays(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("kept")
    (tmp_path / "to").mkdir()
    (tmp_path / "work").symlink_to(tmp_path / "kept")
    replace_folder(tmp_path / "work", lambda draft: (draft / "a").write_text("new"))
    assert (tmp_path / "work" / "a").read_text() == "new"
    assert not (tmp_path / "work").is_symlink()
    assert (tmp_path / "kept" / "file").read_text() == "kept"


def test_without_force_a_file_that_came_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "scheme.yaml"

    def write(draft: Path) -> None:
        draft.write_text("mine")
        path.write_text("of another process")

    with pytest.raises(NmfxError, match=r"scheme\.yaml exists already"):
        write_atomic(path, write, force=False)
    assert path.read_text() == "of another process"
    assert os.listdir(tmp_path) == ["scheme.yaml"]


def test_a_name_too_long_for_the_disk_is_an_error_of_ours(tmp_path: Path) -> None:
    write_atomic(tmp_path / ("n" * 255), text("new"))  # as long as it may be
    with pytest.raises(NmfxError, match="cannot be written"):
        write_atomic(tmp_path / ("n" * 256), text("new"))
    with pytest.raises(NmfxError, match="give its name"):
        replace_folder(Path(), lambda draft: None)


def test_what_cannot_reach_the_disk_is_an_error_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "scheme.yaml"
    path.write_text("old")
    real = os.fsync

    def full(file: int) -> None:
        if os.fstat(file).st_size == 3:
            raise OSError(28, "No space left on device")
        real(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NmfxError, match="No space left"):
        write_atomic(path, text("new"))
    assert path.read_text() == "old"


def test_everything_reaches_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = list[str]()
    for name in ("fsync", "replace", "rename", "link"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name: said.append(name) or real(*a))
    for work in (
        lambda: write_atomic(tmp_path / "file", text("new")),
        lambda: write_atomic(tmp_path / "other", text("new"), force=False),
        lambda: replace_folder(tmp_path / "folder", lambda draft: (draft / "a").write_text("new")),
    ):
        said.clear()
        work()
        (at,) = [i for i, name in enumerate(said) if name != "fsync"]
        assert said[1:at] and said[at + 1 :] == ["fsync"]  # noqa: PT018 - the mark's, the content's; then the folder's


def test_a_lock_is_for_one_at_a_time_and_ends_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    read, write = os.pipe()

    def work() -> None:
        with locked(path, 1) as mine:
            assert mine
            os.write(write, b"x")
            time.sleep(60)

    child = forked(work)
    os.read(read, 1)
    with locked(path, 0.1) as mine:
        assert not mine
    killer = threading.Timer(0.2, os.kill, (child, signal.SIGKILL))
    killer.start()
    with locked(path, 30) as mine:
        assert mine
    os.waitpid(child, 0)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for nowhere in (tmp_path / "link", tmp_path / "no" / "lock"):
        with locked(nowhere, 1) as mine:
            assert not mine
    assert not (tmp_path / "elsewhere").exists()
