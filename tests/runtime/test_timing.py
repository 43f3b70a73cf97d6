"""Laws of measured times: of this machine at this pace, whole or measured again, and none is lost."""

from __future__ import annotations

import copy
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from children import Answer, apart
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nmfx.runtime.measuring import timing
from nmfx.runtime.measuring.timing import Times, cache_folder, measure, same_pace

WAYS = ("dense", "sparse")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_times: None) -> Path:
    """An empty cache, no kernel, and a machine whose pace is 1 and 2."""
    monkeypatch.setenv("NMFX_CACHE", str(tmp_path))
    monkeypatch.setattr(timing, "kernel_digest", lambda: "none")
    monkeypatch.setattr(timing, "measure_pace", lambda: {"product": 1.0, "copy": 2.0})
    monkeypatch.setattr(timing, "CHANGED", 1.5)
    return tmp_path


def asked(what: Any, seconds: float, times: Times | None = None) -> tuple[dict[str, float], bool]:
    """The answer to a question that is worth these seconds, saved; and whether it was measured."""
    measured = list[str]()
    times = times or Times()
    before = timing.measure
    timing.measure = lambda candidates, **_: measured.append("x") or dict.fromkeys(candidates, seconds)
    try:
        found = times.get(what, WAYS, lambda: dict.fromkeys(WAYS, lambda: None))
    finally:
        timing.measure = before
    times.save()
    return found, bool(measured)


def file() -> Path:
    (path,) = (cache_folder() / "times").glob("*.json")
    return path


def test_it_is_measured_once() -> None:
    assert asked("a", 1.0) == ({"dense": 1.0, "sparse": 1.0}, True)
    assert asked("a", 2.0) == ({"dense": 1.0, "sparse": 1.0}, False)
    assert asked("b", 2.0) == ({"dense": 2.0, "sparse": 2.0}, True)
    assert asked("a", 3.0)[0]["dense"] == 1.0
    said = json.loads(file().read_text())
    assert {"processor", "clock", "cores", "system", "torch", "kernel", "threads", "measured"} <= said["machine"].keys()
    assert said["pace"] == {"product": 1.0, "copy": 2.0}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kernel_digest", lambda: "another"),
        ("processor", lambda: "another"),
        ("_said", lambda path: "3000000"),
        ("ROUNDS", 7),
        ("TURN_SECONDS", 0.004),
    ],
)
def test_times_of_another_machine_or_of_another_kind_do_not_mix(name: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked("a", 1.0)
    with monkeypatch.context() as patch:
        timing._hardware.cache_clear()
        patch.setattr(timing, name, value)
        assert asked("a", 2.0)[0]["dense"] == 2.0
        assert asked("a", 3.0)[0]["dense"] == 2.0
    timing._hardware.cache_clear()
    assert asked("a", 4.0)[0]["dense"] == 1.0


def test_nor_those_of_other_threads_torch_settings_or_copied_files(monkeypatch: pytest.MonkeyPatch) -> None:
    asked("a", 1.0)
    first = file().read_bytes()
    for change in (
        lambda patch: patch.setattr(torch, "get_num_threads", lambda: 64),
        lambda patch: patch.setattr(torch, "__version__", "2.0.0"),
        lambda patch: patch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41"),
        lambda patch: patch.setattr(os, "sched_getaffinity", lambda _: {0, 63}),
    ):
        with monkeypatch.context() as patch:
            change(patch)
            Times().path.write_bytes(first)
            assert asked("a", 2.0)[0]["dense"] == 2.0


@pytest.mark.parametrize(
    ("pace", "same"),
    [({"product": 1.4, "copy": 2.0}, True), ({"product": 1.0, "copy": 1.4}, True), ({"product": 1.6, "copy": 2.0}, False),
     ({"product": 1.0, "copy": 1.2}, False), ({"product": 0.1, "copy": 0.2}, False), ({"product": 1.0}, False)],
)  # fmt: skip
def test_another_pace_is_another_measurement(pace: dict[str, float], same: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked("a", 1.0)
    monkeypatch.setattr(timing, "measure_pace", lambda: pace)
    assert asked("a", 2.0)[0]["dense"] == (1.0 if same else 2.0)
    asked("b", 3.0)
    assert json.loads(file().read_text())["pace"] == ({"product": 1.0, "copy": 2.0} if same else pace)
    assert same_pace(pace, pace)


def test_the_pace_of_this_machine_is_near_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    pace = timing.measure_pace()
    assert pace.keys() == {"product", "copy"}
    assert all(0 < seconds < 1 for seconds in pace.values())


def test_two_processes_lose_nothing_of_each_other() -> None:
    one, other = Times(), Times()
    asked("a", 1.0, one)
    asked("b", 2.0, other)
    asked("c", 3.0, one)
    assert [asked(what, 9.0)[0]["dense"] for what in "abc"] == [1.0, 2.0, 3.0]

    def work(number: int) -> bool:
        for round_ in range(8):
            asked(f"{number} {round_}", 1.0 + number)
        return True

    workers = [Answer(lambda number=number: work(number)) for number in range(4)]
    assert [one.get() for one in workers] == [True] * 4
    for number in range(4):
        for round_ in range(8):
            assert asked(f"{number} {round_}", 9.0) == (dict.fromkeys(WAYS, 1.0 + number), False)


def test_where_nothing_can_be_written_it_is_measured_again(cache: Path) -> None:
    (cache / "times").write_text("a file")
    assert asked("a", 1.0)[1]
    assert asked("a", 2.0)[0]["dense"] == 2.0


def test_a_question_with_other_answers_is_asked_again() -> None:
    times = Times()
    times.known[timing._digest("a")[:24]] = {"other": 1.0}
    assert asked("a", 2.0, times) == (dict.fromkeys(WAYS, 2.0), True)


FORMS: list[str] = [
    "", "{", "[]", "3", "null", '"text"', "NaN", "{}", '{"a": 1}', '{"a": {"dense": 1}}', '{"a": [1]}', "[" * 100_000,
    '{"machine": {}, "pace": {}, "known": {}, "digest": ""}', '{"machine": 1, "pace": [], "known": "", "digest": {}}',
    '{"known": {"a": {"dense": NaN}}}', '{"known": {"a": {"dense": 1e999}}}', '{"known": {"a": null}}', "\0", "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("content", FORMS, ids=lambda form: form[:30])
def test_a_file_of_another_form_is_measured_again(content: str) -> None:
    asked("a", 1.0)
    file().write_bytes(content.encode(errors="surrogatepass"))
    assert asked("a", 2.0) == (dict.fromkeys(WAYS, 2.0), True)
    assert asked("a", 3.0) == (dict.fromkeys(WAYS, 2.0), False)


def anywhere(tree: Any) -> list[tuple[Any, Any]]:
    """Every place of a tree: what holds it, and its key."""
    keys = list(tree) if isinstance(tree, dict) else []
    return [(tree, key) for key in keys] + [place for key in keys for place in anywhere(tree[key])]


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.floats(), max_size=2),
)  # fmt: skip


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), value=VALUES, resign=st.booleans())
def test_a_changed_file_gives_what_was_written_or_is_measured_again(data: st.DataObject, value: Any, resign: bool) -> None:
    """Also when whoever changed it has made the digest anew: then its times may be others, but they are times."""
    for path in (cache_folder() / "times").glob("*.json"):
        path.unlink()
    asked("a", 1.0)
    tree = json.loads(file().read_text())
    places = anywhere(tree)
    holder, key = places[data.draw(st.integers(0, len(places) - 1))]
    kind = data.draw(st.sampled_from(["replace", "delete", "rename"]))
    before = copy.deepcopy(tree)
    if kind == "replace":
        holder[key] = value
    else:
        moved = holder.pop(key)
        holder |= {f"{key}x": moved} if kind == "rename" else {}
    if resign and isinstance(tree.get("known"), dict):
        tree["digest"] = timing._digest(tree.get("machine"), tree.get("pace"), tree["known"])
    file().write_text(json.dumps(tree))
    found, measured = asked("a", 2.0)
    assert found.keys() == set(WAYS)
    if tree == before or not resign:
        assert found == (dict.fromkeys(WAYS, 2.0) if measured else dict.fromkeys(WAYS, 1.0))
    assert all(isinstance(seconds, float) and 0 < seconds < 1e7 for seconds in found.values())


def test_a_bit_of_a_number_is_noticed() -> None:
    asked("a", 1.0)
    text = file().read_text()
    assert text.count(":1.0") == 3  # two times, and the pace
    for number in ("1.5", "9.0", "2.0"):
        file().write_text(text.replace('"dense":1.0', f'"dense":{number}'))
        assert asked("a", 3.0) == (dict.fromkeys(WAYS, 3.0), True)
        file().write_text(text)
        assert asked("a", 3.0) == (dict.fromkeys(WAYS, 1.0), False)


@pytest.mark.parametrize(
    "make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)], ids=["pipe", "folder", "device"]
)
def test_what_is_no_file_is_not_waited_for(make: Callable[[Path], None]) -> None:
    path = Times().path
    path.parent.mkdir()
    make(path)
    assert asked("a", 1.0)[1]


def test_rounds_are_those_of_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[int]()
    measure({"a": lambda: calls.append(1)})
    few = len(calls)
    monkeypatch.setattr(timing, "ROUNDS", 7)
    calls.clear()
    measure({"a": lambda: calls.append(1)})
    assert few == 4  # twice before, and one round of two
    assert len(calls) == 16


def test_tests_have_a_cache_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """So have the processes that they start."""
    monkeypatch.undo()
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nmfx"
    assert "nmfx-tests-" in str(cache_folder())
    assert user not in (cache_folder(), *cache_folder().parents)
    assert apart(lambda: str(cache_folder())) == str(cache_folder())
    run = subprocess.run(["printenv", "NMFX_CACHE"], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(cache_folder())
