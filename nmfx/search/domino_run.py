"""DominoSearch over a loader: the published loop, checkpointed and resumed bit for bit, in one process or several."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from nmfx.data.loader import TrainLoader
from nmfx.data.seeding import seed_of
from nmfx.errors import CheckpointError, NmfxError, SearchError
from nmfx.files.parsing import Count, Finite, Form, Share, printable
from nmfx.files.states import check_tensors, prefixed, read_state, under, write_state
from nmfx.masking.copies import deep_copy
from nmfx.masking.parallel import wrap
from nmfx.masking.sites import masked_sites
from nmfx.passes.thresholds import SUFFIXES
from nmfx.processes import rank, world
from nmfx.search.domino_loop import DominoSearch
from nmfx.sparsity.pattern import Pattern

KIND = "search"
SAVE_SECONDS = 180.0
MOST = 100_000  # iterations; published searches take under 30,000


class _Event(Form, frozen=True):
    """An `Event` in a file."""

    site: str
    before: str
    after: str
    reason: str
    cost: int | Finite
    time: Finite


class _State(Form, frozen=True):
    """What `DominoSearch.state_dict` gives, without its tensors."""

    search: str
    t: Count
    done: bool
    working: dict[str, Count]
    choice: dict[str, Count]
    shares: dict[str, Share]
    events: list[_Event]


class _About(Form, frozen=True):
    """What a state says beside its tensors: the settings of its search, and where it stood."""

    settings: dict[str, Any]
    state: _State


def run_domino(
    model: nn.Module,
    loader: TrainLoader,
    target: float | str = 0.875,
    *,
    lr: float = 0.01,
    seed: int = 0,
    device: str | torch.device = "cpu",
    checkpoint: Path | None = None,
    most: int = MOST,
    progress: Callable[[DominoSearch], None] | None = None,
    **options: Any,
) -> DominoSearch:
    """Search a copy of `model` on training batches until the budget holds (domino.md, section 4: plain SGD, batch norm in train
    mode); the model itself is not changed.

    Args:
        loader: batches whose content depends on (epoch, step) only.
        checkpoint: a safetensors file to write every few minutes and to resume from; it stays until the caller removes it.
        most: iterations after which to give up.
        progress: called after every iteration; a KeyboardInterrupt that it raises leaves a checkpoint behind.
        options: those of `DominoSearch`.

    Under torch.distributed, started by the caller, every process runs its share of each batch.

    Returns:
        The search at its end, with its scheme.

    Raises:
        SearchError: a checkpoint of another search, a loss that is not finite, no end after `most` iterations.
    """
    searched = deep_copy(model).to(device).train()
    search = DominoSearch(searched, target, **options)
    optimizer = torch.optim.SGD(searched.parameters(), lr=lr)
    settings = {"target": str(target), "lr": lr, "seed": seed, "batch": loader.inner.batch_sampler.batch_size}  # type: ignore
    settings |= {"loop": str(search.loop), "sites": search.sites.fingerprint, "options": str(search.problem.options)}
    settings |= {"budgets": str(search.problem.budgets), "processes": world()}
    if checkpoint is not None and checkpoint.exists():
        _load(checkpoint, search, settings)
    scores = [f"{masked.name}{suffix}" for masked in masked_sites(searched) for suffix in SUFFIXES]
    wrapped, saved = wrap(searched, scores), time.monotonic()  # scores follow from the weights, as masks do
    batches = _endless(loader, search.t)
    while not search.done:
        if search.t >= most:
            raise SearchError(
                f"no end after {search.t} iterations: sparsity {search.sparsity:.4f}; raise decay, or lower the target"
            )
        x, label = next(batches)
        torch.manual_seed(seed_of("search", seed, rank(), search.t))  # dropout: the same after a resume
        optimizer.zero_grad()
        loss = _loss(wrapped(x.to(device)), label.to(device))
        if not bool(loss.isfinite()):
            raise SearchError(
                f"the loss is {loss.item()} at iteration {search.t}: lower lr ({lr}) or decay ({search.loop.decay})"
            )
        loss.backward()
        search.step()
        optimizer.step()
        try:
            if progress is not None:
                progress(search)
        except KeyboardInterrupt:  # between two iterations: nothing is half done
            if checkpoint is not None and rank() == 0:
                _save(checkpoint, search, settings)
            raise
        if checkpoint is not None and (search.done or time.monotonic() - saved > SAVE_SECONDS) and rank() == 0:
            _save(checkpoint, search, settings)
            saved = time.monotonic()
    return search


def _loss(outputs: Any, label: Tensor) -> Tensor:
    """Cross-entropy of the first output: auxiliary heads, which come after it, count 0.3 and 0.4 in their own recipes only."""
    logits = (
        outputs if isinstance(outputs, Tensor) else next(iter(outputs.values() if isinstance(outputs, Mapping) else outputs))
    )
    loss: Tensor = nn.functional.cross_entropy(logits, label)
    return loss


def _endless(loader: TrainLoader, t: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Epoch after epoch, from iteration t on."""
    loader.set_epoch(0)
    epoch, skip = divmod(t, len(loader))
    while True:
        loader.set_epoch(epoch, skip=skip)
        yield from loader
        epoch, skip = epoch + 1, 0


def _save(path: Path, search: DominoSearch, settings: Mapping[str, Any]) -> None:
    state = search.state_dict()
    tensors = prefixed("threshold", state.pop("thresholds")) | prefixed("model", search.model.state_dict())
    write_state(path, KIND, tensors, {"settings": dict(settings), "state": state})


def _load(path: Path, search: DominoSearch, settings: Mapping[str, Any]) -> None:
    """Raises SearchError when the file is not of this search, which is then as it was."""
    try:
        tensors, about = read_state(path, KIND, "a search", _About)
    except CheckpointError as error:
        raise SearchError(str(error)) from error
    before, state = about.settings, about.state
    now = json.loads(json.dumps(dict(settings)))
    if different := [f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]]:
        raise SearchError(
            f"{path} is of a search with other settings ({printable('; '.join(different))}); give the same ones to resume it, "
            f"or --force to start anew"
        )
    model, thresholds = under("model", tensors), under("threshold", tensors)
    try:
        check_tensors(search.model.state_dict(), model)
        check_tensors(search.state_dict()["thresholds"], thresholds)
        _check_steps(search, state)
        search.model.load_state_dict(model)
        search.load_state_dict({**msgspec.to_builtins(state), "thresholds": thresholds})
    except (NmfxError, RuntimeError) as error:
        why = printable(str(error))
        raise SearchError(f"{path}: not of this search ({why}); remove it, or give --force to start anew") from error


def _check_steps(search: DominoSearch, state: _State) -> None:
    """Check that every site stands on one of its options, or between two of them.

    Raises:
        SearchError: naming the site.
    """
    names = search.intermediate.keys()
    for key, said in {"working": state.working, "choice": state.choice}.items():
        if said.keys() != names:
            raise SearchError(f"{key}: expected the {len(names)} sites of the search, found {len(said)} names")
    for i in search.problem.free:
        name, options = search.sites.sites[i].name, search.problem.options[i]
        n, choice = state.working[name], state.choice[name]
        most = [option.n for option in options[:-1]] + [search.problem.start_n(i)]
        if not (choice < len(options) and (most[choice - 1] < n <= most[choice] if choice else n == most[0])):
            raise SearchError(f"{name}: N = {n} at option {choice} of {len(options)} is no step of the search")
    for event in state.events:
        Pattern(event.before), Pattern(event.after)
