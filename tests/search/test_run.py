"""Laws of the search over a loader: resumed it is the search that was never interrupted, and the model stays as it was."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nmfx.cli.main import main
from nmfx.data.config import picture_config
from nmfx.data.loader import TrainLoader, train_loader
from nmfx.data.source import open_data
from nmfx.demo.digits import load_demo
from nmfx.errors import SearchError
from nmfx.search import domino_run as run
from nmfx.search.domino_loop import DominoSearch
from nmfx.search.domino_run import run_domino

FAST: dict[str, Any] = {"vote_every": 4, "penalty_every": 2, "decay": 5.0, "example_input": torch.empty(1, 1, 8, 8)}


class Stop(Exception):
    """Stands for a kill."""


def loader(model: nn.Module, **options: Any) -> TrainLoader:
    data = open_data("digits")
    return train_loader(data, picture_config(model, data), batch_size=64, **options)


def found(search: DominoSearch) -> tuple[Any, ...]:
    return search.t, search.events, search.intermediate, search.committed, search.scheme


@pytest.mark.parametrize("stops", [[1], [7, 30, 31]], ids=str)
def test_a_resumed_search_is_the_uninterrupted_one(stops: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "SAVE_SECONDS", 0.0)
    model = load_demo(trained=True)
    whole = run_domino(model, loader(model), "3x", **FAST)
    for at in stops:

        def stop(search: DominoSearch, at: int = at) -> None:
            if search.t == at:
                raise Stop

        with pytest.raises(Stop):
            run_domino(model, loader(model), "3x", checkpoint=tmp_path / "s.safetensors", progress=stop, **FAST)
    resumed = run_domino(model, loader(model), "3x", checkpoint=tmp_path / "s.safetensors", **FAST)
    assert whole.t > max(stops)
    assert found(resumed) == found(whole)
    states = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])


def test_an_interrupted_search_is_saved(tmp_path: Path) -> None:
    model, path = load_demo(trained=True), tmp_path / "s.safetensors"

    def interrupt(search: DominoSearch) -> None:
        if search.t == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_domino(model, loader(model), "3x", checkpoint=path, progress=interrupt, **FAST)
    assert found(run_domino(model, loader(model), "3x", checkpoint=path, **FAST)) == found(
        run_domino(model, loader(model), "3x", **FAST)
    )


def test_the_model_is_left_alone() -> None:
    model = load_demo(trained=True)
    before, kind = {k: v.clone() for k, v in model.state_dict().items()}, type(model)
    search = run_domino(model, loader(model), 0.5, **FAST)
    assert type(model) is kind
    assert not model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert search.scheme.totals(search.sites).sparsity >= 0.5


def test_another_search_is_not_resumed(tmp_path: Path) -> None:
    model = load_demo(trained=True)
    run_domino(model, loader(model), 0.5, checkpoint=tmp_path / "s.safetensors", **FAST)
    with pytest.raises(SearchError, match=r"other settings \(target 0.5 -> 0.6"):
        run_domino(model, loader(model), 0.6, checkpoint=tmp_path / "s.safetensors", **FAST)
    (tmp_path / "t.safetensors").write_bytes(b"no search")
    with pytest.raises(SearchError, match="not a search to resume"):
        run_domino(model, loader(model), 0.5, checkpoint=tmp_path / "t.safetensors", **FAST)


def test_a_search_that_does_not_end_says_so() -> None:
    model = load_demo(trained=True)
    with pytest.raises(SearchError, match="no end after 5 iterations"):
        run_domino(model, loader(model), 0.5, most=5, **{**FAST, "decay": 0.0})


def test_a_loss_that_is_not_finite_says_so() -> None:
    model = load_demo(trained=True)
    with pytest.raises(SearchError, match=r"the loss is (nan|inf) at iteration"):
        run_domino(model, loader(model), 0.9, lr=1e20, **FAST)


COMMAND = ["search", "--method", "domino", "--data", "digits", "--target", "2x", "--decay", "5", "--vote-every", "10"]


def test_a_killed_command_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = "import nmfx.search.domino_run as r, sys; r.SAVE_SECONDS = 0; "
    start += "from nmfx.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", start, *COMMAND]
    killed, through = tmp_path / "killed", tmp_path / "through"
    killed.mkdir(), through.mkdir()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as here
    process = subprocess.Popen(command, cwd=killed, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    saved = killed / "digits.nmfx" / "scheme.search.safetensors"
    for _ in range(600):
        if saved.exists():
            break
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (killed / "digits.nmfx" / "scheme.yaml").exists()
    again = subprocess.run(command, cwd=killed, env=environment, capture_output=True, text=True, check=True)
    assert "going on with" in again.stdout
    monkeypatch.chdir(through)
    assert main(COMMAND) == 0
    schemes = [(folder / "digits.nmfx" / "scheme.yaml").read_text() for folder in (killed, through)]
    assert schemes[0] == schemes[1]
    assert not saved.exists()


def test_torchrun_uses_every_process(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "nmfx", *COMMAND]
    finished = subprocess.run(torchrun, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert finished.stdout.count("wrote digits.nmfx/scheme.yaml") == 1  # the first process speaks for all
    assert "domino with data" in (tmp_path / "digits.nmfx" / "scheme.yaml").read_text()


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_a_model_that_deepcopy_refuses_is_searched_and_left_alone() -> None:
    """A weight that a hook has computed is no leaf of the graph."""
    torch.manual_seed(0)
    normed = torch.nn.utils.weight_norm(nn.Linear(64, 32))
    model = nn.Sequential(nn.Flatten(), normed, nn.ReLU(), nn.Linear(32, 10))
    model(torch.zeros(1, 1, 8, 8))
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = open_data("digits")
    batches = train_loader(data, picture_config(load_demo(trained=True), data), batch_size=64)
    search = run_domino(model, batches, 0.3, m=4, **FAST)
    assert search.done
    assert all(value.equal(model.state_dict()[name]) for name, value in before.items())
