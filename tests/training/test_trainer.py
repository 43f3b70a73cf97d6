"""Laws of finetune: it learns under its masks, and a run is the same however often it is stopped, cut up or shared out."""

from __future__ import annotations

import csv
import errno
import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torchvision.models.googlenet import GoogLeNetOutputs
from torchvision.models.inception import InceptionOutputs

from nmfx.data.config import picture_config
from nmfx.data.loader import validation_loader
from nmfx.data.pictures import ArrayPictures
from nmfx.data.source import Data, open_data
from nmfx.demo.digits import load_demo
from nmfx.errors import CheckpointError, DataError, NmfxError
from nmfx.export.checkpoint import load_checkpoint, save_checkpoint
from nmfx.files import sealed
from nmfx.files.atomic import draft_in
from nmfx.masking.sites import masked_sites
from nmfx.passes.baking import bake
from nmfx.passes.transform import transform
from nmfx.passes.verification import verify
from nmfx.settings.training import Augment, Settings
from nmfx.training import trainer
from nmfx.training.evaluation import evaluate
from nmfx.training.finetuning import finetune
from nmfx.training.loss import distilled, task_loss
from nmfx.training.masks import set_training
from nmfx.training.record import Progress
from nmfx.training.state import load_state, save_state
from nmfx.training.trainer import BEST, LAST, LOG, load_best

QUICK = Settings(epochs=2, batch_size=64, lr=0.02, save_seconds=0)
EXAMPLE = torch.zeros(1, 1, 8, 8)


@pytest.fixture(scope="module")
def digits() -> Data:
    return open_data("digits")


@pytest.fixture(scope="module")
def few(digits: Data) -> Data:
    return a_few(digits)


def a_few(digits: Data) -> Data:
    """320 training pictures: 5 updates an epoch."""
    train, validation = digits.train, digits.validation
    assert isinstance(train, ArrayPictures)
    assert isinstance(validation, ArrayPictures)
    smaller = replace(train, pictures=train.pictures[:320], labels=train.labels[:320])
    return replace(
        digits,
        train=smaller,
        validation=replace(validation, pictures=validation.pictures[:100], labels=validation.labels[:100]),
    )


def demo(**options: Any) -> nn.Module:
    return transform(load_demo(trained=True), "2:16", example_input=EXAMPLE, **options)


def without_batch_statistics(**options: Any) -> nn.Module:
    """So that parts of a batch make the whole."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 16, 3), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.Flatten(), nn.Linear(32 * 16, 10))
    return transform(nn.Sequential(*layers), "2:4", example_input=EXAMPLE, **options)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def log(folder: Path) -> list[dict[str, str]]:
    """Without what a clock says."""
    with (folder / LOG).open() as file:
        return [{key: value for key, value in row.items() if key != "images_per_second"} for row in csv.DictReader(file)]


def stop_at(update: int) -> Callable[[Progress], None]:
    def progress(now: Progress) -> None:
        if now.epoch * now.steps + now.step == update:
            raise KeyboardInterrupt

    return progress


# Learning.


def test_it_learns_and_keeps_its_patterns(digits: Data, tmp_path: Path) -> None:
    model, said = demo(), []
    loader = validation_loader(digits, picture_config(model, digits), batch_size=64)
    before = evaluate(model, loader).top1
    result = finetune(model, digits, settings=QUICK, folder=tmp_path, progress=said.append)
    assert result.evaluation.top1 > before + 0.5
    assert not any(module.training for module in model.modules())
    assert evaluate(model, loader) == result.evaluation
    assert verify(model).nonzeros * 8 == verify(model).weights
    assert [row["top1"] for row in log(tmp_path)] == [str(epoch.top1) for epoch in result.epochs]
    assert [now.step for now in said] == [*range(18)] * 2
    assert said[-1].share == 1
    assert said[0].lr < said[2].lr > said[-1].lr  # warm-up, then cosine
    assert said[-1].top1 == result.epochs[0].top1


def test_what_is_saved_scores_as_what_was_trained(digits: Data, tmp_path: Path) -> None:
    model = demo()
    result = finetune(model, digits, settings=replace(QUICK, epochs=1, channels_last=True))
    save_checkpoint(model, tmp_path / "model.safetensors")
    loaded = load_checkpoint(tmp_path / "model.safetensors", load_demo(trained=False))
    loader = validation_loader(digits, picture_config(model, digits), batch_size=64)
    assert evaluate(loaded, loader) == evaluate(bake(loaded), loader) == result.evaluation


def test_fixed_masks_stay_and_dropped_weights_rest(few: Data) -> None:
    model = demo(training="fixed")
    before = [(site.mask.clone(), site.parameter.detach().clone()) for site in masked_sites(model)]
    finetune(model, few, settings=replace(QUICK, weight_decay=0.0))
    for (mask, weight), site in zip(before, masked_sites(model), strict=True):
        assert torch.equal(site.mask, mask)
        assert torch.equal(site.parameter[~mask], weight[~mask])
        assert not torch.equal(site.parameter[mask], weight[mask])


def test_training_can_be_chosen_anew(few: Data, tmp_path: Path) -> None:
    save_checkpoint(demo(), tmp_path / "model.safetensors")
    for training in ("fixed", "sr-ste"):
        model = load_checkpoint(tmp_path / "model.safetensors", load_demo(trained=False))
        set_training(model, training, 1e-3)  # type: ignore[arg-type]
        masks = [site.mask.clone() for site in masked_sites(model)]
        finetune(model, few, settings=replace(QUICK, lr=0.3))
        kept = all(torch.equal(a, site.mask) for a, site in zip(masks, masked_sites(model), strict=True))
        assert kept == (training == "fixed")
        verify(model)


def test_a_dense_model_trains_too(digits: Data) -> None:
    model = load_demo(trained=False)
    assert finetune(model, digits, settings=replace(QUICK, lr=0.1)).evaluation.top1 > 0.5


@pytest.mark.parametrize(
    "options",
    [
        {"amp": "bf16"},
        {"channels_last": True, "clip_grad": 1.0},
        {"ema": 0.9},
        {"distill": 0.5, "temperature": 2.0},
        {"smoothing": 0.1, "opt": "adamw", "lr": 1e-3},
        {"augment": Augment(mixup=0.2), "sched": "none"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_option_learns(options: dict[str, Any], digits: Data) -> None:
    model = demo()
    result = finetune(model, digits, settings=replace(QUICK, **options), teacher=load_demo(trained=True))
    assert result.evaluation.top1 > 0.5
    verify(model)


@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")  # torch 2.6 itself does it
def test_it_trains_compiled(few: Data) -> None:
    plain, compiled = demo(training="fixed"), demo(training="fixed")  # masks that follow would magnify another rounding
    for model, backend in ((plain, ""), (compiled, "aot_eager")):
        finetune(model, few, settings=replace(QUICK, epochs=1, compile=backend))
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, rtol=1e-3, atol=1e-5)


# Resuming.


@pytest.mark.parametrize("update", [0, 3, 4, 5, 8])
@pytest.mark.parametrize("save_seconds", [0.0, 1e9], ids=["saved at every step", "at epoch ends"])
def test_a_stopped_run_ends_as_one_that_was_not(update: int, save_seconds: float, few: Data, tmp_path: Path) -> None:
    settings, whole, stopped = replace(QUICK, save_seconds=save_seconds), demo(), demo()
    expected = finetune(whole, few, settings=settings, folder=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        finetune(stopped, few, settings=settings, folder=tmp_path / "cut", progress=stop_at(update))
    again = demo()
    found = finetune(again, few, settings=settings, folder=tmp_path / "cut")
    assert same(weights(again), weights(whole))
    assert log(tmp_path / "cut") == log(tmp_path / "whole")
    assert found.evaluation == expected.evaluation


@pytest.mark.parametrize(
    ("options", "training"),
    [
        ({"ema": 0.9, "amp": "bf16", "channels_last": True, "accumulate": 2}, "sr-ste"),
        ({"opt": "adamw", "augment": Augment(mixup=0.5), "smoothing": 0.1, "clip_grad": 0.5}, "ste"),
        ({"weight_decay": 0.5, "distill": 0.3, "workers": 1}, "fixed"),
        ({"opt": "lookahead_sgd", "sched": "step"}, "sr-ste"),
    ],
    ids=["average", "adamw", "fixed", "lookahead"],
)
def test_a_run_stopped_again_and_again(options: dict[str, Any], training: str, few: Data, tmp_path: Path) -> None:
    settings, teacher = replace(QUICK, **options), load_demo(trained=True)
    whole = demo(training=training)
    finetune(whole, few, settings=settings, folder=tmp_path / "whole", teacher=teacher)
    for update in (1, 6, 9):
        with pytest.raises(KeyboardInterrupt):
            finetune(
                demo(training=training),
                few,
                settings=settings,
                folder=tmp_path / "cut",
                teacher=teacher,
                progress=stop_at(update),
            )
    again = demo(training=training)
    finetune(again, few, settings=settings, folder=tmp_path / "cut", teacher=teacher)
    assert same(weights(again), weights(whole))
    assert log(tmp_path / "cut") == log(tmp_path / "whole")
    for a, b in zip(masked_sites(again), masked_sites(whole), strict=True):
        assert torch.equal(a.mask, b.mask)


def killed(folder: str, update: int) -> None:
    torch.set_num_threads(1)

    def progress(now: Progress) -> None:
        if now.epoch * now.steps + now.step == update:
            with draft_in(Path(folder)):  # as in the middle of a save
                os.kill(os.getpid(), signal.SIGKILL)

    finetune(demo(), a_few(open_data("digits")), settings=QUICK, folder=Path(folder), progress=progress)


def test_kill_9_loses_nothing(few: Data, tmp_path: Path) -> None:
    process = mp.get_context("spawn").Process(target=killed, args=(str(tmp_path / "cut"), 7))
    process.start()
    process.join()  # however busy the machine is; pytest's own limit holds
    assert process.exitcode == -signal.SIGKILL
    whole, again = demo(), demo()
    finetune(whole, few, settings=QUICK, folder=tmp_path / "whole")
    said: list[Progress] = []
    finetune(again, few, settings=QUICK, folder=tmp_path / "cut", progress=said.append)
    assert [now.step for now in said] == [3, 4]
    assert same(weights(again), weights(whole))
    assert sorted(p.name for p in (tmp_path / "cut").iterdir()) == sorted((LAST, BEST, LOG))


def test_a_finished_run_is_not_trained_again(few: Data, tmp_path: Path) -> None:
    model, again = demo(), demo()
    first = finetune(model, few, settings=QUICK, folder=tmp_path)
    (tmp_path / LOG).unlink()  # killed just before
    second = finetune(again, few, settings=QUICK, folder=tmp_path, progress=stop_at(0))
    assert same(weights(model), weights(again))
    assert second == first
    assert len(log(tmp_path)) == 2


def test_the_best_epoch_is_kept(few: Data, tmp_path: Path) -> None:
    model = demo()
    result = finetune(model, few, settings=replace(QUICK, epochs=3), folder=tmp_path)
    best = load_best(tmp_path, model)
    assert best == result.best
    found = evaluate(model, validation_loader(few, picture_config(model, few), batch_size=64))
    assert (found.top1, found.loss) == (best.top1, best.loss)


def test_other_settings_are_refused_by_name(few: Data, tmp_path: Path) -> None:
    finetune(demo(), few, settings=replace(QUICK, epochs=1), folder=tmp_path)
    before = (tmp_path / LAST).read_bytes()
    with pytest.raises(CheckpointError, match=r"other settings \(lr 0.02 -> 0.03\)"):
        finetune(demo(), few, settings=replace(QUICK, epochs=1, lr=0.03), folder=tmp_path)
    with pytest.raises(CheckpointError, match=r"pattern of block1.conv.weight 2:16 sr-ste 0.0002 -> 2:16 ste; .* 2 more"):
        finetune(demo(training="ste"), few, settings=replace(QUICK, epochs=1), folder=tmp_path)
    with pytest.raises(CheckpointError, match="start absent -> b"):
        finetune(demo(), few, settings=replace(QUICK, epochs=1), folder=tmp_path, about={"start": "b"})
    assert (tmp_path / LAST).read_bytes() == before
    free = replace(QUICK, epochs=1, workers=1, save_seconds=5)
    finetune(demo(), few, settings=free, folder=tmp_path, progress=stop_at(0))


def test_a_run_is_extended_by_more_epochs(few: Data, tmp_path: Path) -> None:
    """Its learning rates are then those of the longer run, and a stop in the extension changes nothing."""
    longer = replace(QUICK, epochs=4)
    whole = demo()
    finetune(whole, few, settings=longer, folder=tmp_path / "whole")
    for folder in ("once", "cut"):
        finetune(demo(), few, settings=QUICK, folder=tmp_path / folder)
    before, said, once, again = log(tmp_path / "once"), list[Progress](), demo(), demo()
    result = finetune(once, few, settings=longer, folder=tmp_path / "once", progress=said.append)
    assert (said[0].epoch, len(said), len(result.epochs)) == (2, 10, 4)
    rows = log(tmp_path / "once")
    assert rows[:2] == before
    assert [row["lr"] for row in rows[2:]] == [row["lr"] for row in log(tmp_path / "whole")[2:]]
    with pytest.raises(KeyboardInterrupt):
        finetune(demo(), few, settings=longer, folder=tmp_path / "cut", progress=stop_at(17))
    finetune(again, few, settings=longer, folder=tmp_path / "cut")
    assert same(weights(once), weights(again))
    assert log(tmp_path / "cut") == rows
    with pytest.raises(CheckpointError, match=r"other settings \(epochs 4 -> 3\)"):
        finetune(demo(), few, settings=replace(QUICK, epochs=3), folder=tmp_path / "cut")


def test_the_first_of_the_best_epochs_is_the_best(few: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, tops, states = trainer.evaluate, iter([0.5, 0.75, 0.75, 0.25]), []
    monkeypatch.setattr(trainer, "evaluate", lambda *a: replace(real(*a), top1=next(tops, 0.0)))
    model = demo()
    result = finetune(
        model, few, settings=replace(QUICK, epochs=4), folder=tmp_path, after_epoch=lambda _: states.append(weights(model))
    )
    assert result.best == load_best(tmp_path, model) == result.epochs[1]
    assert same(weights(model), states[1])


@pytest.mark.parametrize("content", [b"", b"\x00" * 100])
def test_a_damaged_state_is_refused(content: bytes, few: Data, tmp_path: Path) -> None:
    (tmp_path / LAST).write_bytes(content)
    with pytest.raises(CheckpointError, match="not a training run"):
        finetune(demo(), few, settings=QUICK, folder=tmp_path)


# Cut up and shared out.


def test_passes_follow_the_whole_batch(few: Data) -> None:
    whole, parts = (without_batch_statistics(decay=0.05) for _ in range(2))
    start = weights(whole)
    finetune(whole, few, settings=QUICK)
    finetune(parts, few, settings=replace(QUICK, accumulate=2))
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-3, atol=1e-5)
        assert not torch.equal(value, start[name])
    assert {site.spec.decay for site in masked_sites(parts)} == {0.05}  # as it was
    other = without_batch_statistics(decay=0.1)  # what a decay for each pass would come to is something else
    finetune(other, few, settings=QUICK)
    assert any(not torch.allclose(other.state_dict()[n], v, rtol=1e-3, atol=1e-5) for n, v in whole.state_dict().items())


def worker(rank: int, folder: str, settings: Settings) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = without_batch_statistics(decay=0.05)
    result = finetune(model, a_few(open_data("digits")), settings=settings, folder=Path(folder) / "run")
    torch.save((model.state_dict(), result.evaluation.top1, result.evaluation.samples), f"{folder}/{rank}.pt")
    resumed(rank, Path(folder), settings.parallel)
    dist.destroy_process_group()


def resumed(rank: int, folder: Path, parallel: Literal["ddp", "fsdp"]) -> None:
    """With batch statistics and a moving average, which each process finds for itself; one process alone is asked to stop.
    Under FSDP with a state of several tensors a weight, masks that stay, and no save but the one at the stop.
    """
    settings, kind = replace(QUICK, ema=0.9, parallel=parallel), {}
    if parallel == "fsdp":
        settings, kind = replace(settings, opt="adamw", lr=0.002, save_seconds=100), {"training": "fixed"}
    few, whole, again = a_few(open_data("digits")), demo(**kind), demo(**kind)
    result = finetune(whole, few, settings=settings, folder=folder / "whole")
    verify(whole)
    ask = stop_at(7) if rank else None
    with pytest.raises(KeyboardInterrupt):
        finetune(demo(**kind), few, settings=settings, folder=folder / "cut", progress=ask)
    dist.barrier()  # a new start would come after the last save
    torch.nn.init.zeros_(again.classifier.weight)  # type: ignore[union-attr, arg-type]
    said: list[Progress] = []
    resumed = finetune(again, few, settings=settings, folder=folder / "cut", progress=said.append)
    assert resumed.evaluation == result.evaluation
    assert [now.step for now in said] == [3, 4]
    assert same(weights(again), weights(whole))
    assert rank or log(folder / "cut") == log(folder / "whole")
    best = load_best(folder / "cut", again)
    assert (best.epoch, best.top1, best.loss) == (result.best.epoch, result.best.top1, result.best.loss)


def refused(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    with pytest.raises(NmfxError, match="needs a GPU: take a newer torch, or train with DDP instead"):
        finetune(demo(), a_few(open_data("digits")), settings=replace(QUICK, parallel="fsdp"))
    dist.destroy_process_group()


FSDP = hasattr(torch.cpu.current_stream(), "record_event")  # the first versions of fully_shard want a GPU


@pytest.mark.skipif(FSDP, reason="torch is new enough")
def test_a_torch_that_cannot_share_out_on_the_cpu_is_an_error(tmp_path: Path) -> None:
    mp.spawn(refused, args=(str(tmp_path),), nprocs=2)


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.skipif(not FSDP, reason="needs a GPU"))])
def test_two_processes_follow_one(parallel: Literal["ddp", "fsdp"], few: Data, tmp_path: Path) -> None:
    settings = replace(QUICK, accumulate=2, clip_grad=1.0, channels_last=parallel == "fsdp", parallel=parallel)
    alone = without_batch_statistics(decay=0.05)
    expected = finetune(alone, few, settings=settings)
    mp.spawn(worker, args=(str(tmp_path), settings), nprocs=2)
    (first, top1, samples), (second, *rest) = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert rest == [top1, samples]
    assert samples == expected.evaluation.samples
    assert top1 == pytest.approx(expected.evaluation.top1, abs=0.02)
    assert same(first, second)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(first[name], value, rtol=1e-3, atol=1e-5)
    assert len(log(tmp_path / "run")) == 2


# What goes wrong.


def test_a_loss_that_is_no_number_leaves_the_last_state(few: Data, tmp_path: Path) -> None:
    whole, broken = demo(), demo()
    finetune(whole, few, settings=QUICK, folder=tmp_path / "whole")

    def spoil(now: Progress) -> None:
        if (now.epoch, now.step) == (1, 1):
            nn.init.constant_(broken.classifier.bias, math.nan)  # type: ignore[union-attr, arg-type]

    with pytest.raises(NmfxError, match=r"the loss is nan in epoch 1, at update 7: lower lr .* holds the last good state"):
        finetune(broken, few, settings=QUICK, folder=tmp_path / "cut", progress=spoil)
    again = demo()
    finetune(again, few, settings=QUICK, folder=tmp_path / "cut")
    assert same(weights(again), weights(whole))


def test_a_full_disk_leaves_the_last_state(few: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: Any, path: Path, **options: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(KeyboardInterrupt):
        finetune(demo(), few, settings=QUICK, folder=tmp_path, progress=stop_at(2))
    before = (tmp_path / LAST).read_bytes()
    monkeypatch.setattr(sealed, "save_file", full)
    with pytest.raises(NmfxError, match="cannot be written: No space left"):
        finetune(demo(), few, settings=QUICK, folder=tmp_path)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(LAST, before)]


def test_a_state_with_no_numbers_is_not_written(tmp_path: Path) -> None:
    save_state(tmp_path / LAST, {"a": torch.ones(2)}, {"x": 1})
    with pytest.raises(CheckpointError, match="b is not finite"):
        save_state(tmp_path / LAST, {"b": torch.tensor([1, math.inf])}, {})
    tensors, about = load_state(tmp_path / LAST, dict)
    assert same(tensors, {"a": torch.ones(2)})
    assert about == {"x": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs=0: expected a whole number, 1 to 1000000"),
        ({"warmup_epochs": 2}, "warmup_epochs=2: expected fewer than epochs=2"),
        ({"lr": math.inf}, "lr=inf: expected a number, above 0"),
        ({"lr": -0.1}, "lr=-0.1: expected a number, above 0"),
        ({"lr": math.nan}, "lr=nan: expected a number, above 0"),
        ({"lr": "0.1"}, "lr='0.1': expected a number"),
        ({"epochs": 1.5}, "epochs=1.5: expected a whole number"),
        ({"epochs": True}, "epochs=True: expected a whole number"),
        ({"accumulate": 0}, "accumulate=0: expected a whole number, 1 or more"),
        ({"weight_decay": math.nan}, "weight_decay=nan: expected a number, 0 or more"),
        ({"clip_grad": math.nan}, "clip_grad=nan: expected a number, 0 or more"),
        ({"temperature": math.inf}, "temperature=inf: expected a number, above 0"),
        ({"ema": 1.0}, "ema=1.0: expected a number, 0 or more and below 1"),
        ({"save_seconds": math.nan}, "save_seconds=nan: expected a number"),
        ({"workers": -1}, "workers=-1: expected a whole number, 0 to 256"),
        ({"momentum": None}, "momentum=None: expected a number"),
        ({"batch_size": 63, "accumulate": 2}, "63 does not divide by 1 processes x 2"),
        ({"batch_size": 512}, "do not fill one step"),
        ({"batch_size": 400, "accumulate": 2}, "too few pictures"),
        ({"opt": "sdg"}, "timm does not accept opt 'sdg'"),
        ({"sched": "cosign"}, "timm does not accept .* 'cosign'"),
        ({"distill": 0.5}, "give finetune"),
    ],
)
def test_settings_that_do_not_go(options: dict[str, Any], message: str, few: Data) -> None:
    with pytest.raises(NmfxError, match=message):
        finetune(demo(), few, settings=replace(QUICK, **options))


@pytest.mark.parametrize("decay", [-1.0, math.nan, math.inf])
def test_a_decay_that_is_none(decay: float) -> None:
    with pytest.raises(NmfxError, match="finite factor of 0 or more"):
        demo(decay=decay)
    with pytest.raises(NmfxError, match="finite factor of 0 or more"):
        set_training(demo(), "sr-ste", decay)
    with pytest.raises(NmfxError, match="unknown training 'asp'; known: sr-ste, ste, fixed"):
        set_training(demo(), "asp")  # type: ignore[arg-type]


def test_without_validation_pictures_nothing_begins(few: Data) -> None:
    assert isinstance(few.validation, ArrayPictures)
    none = replace(
        few, validation=replace(few.validation, pictures=few.validation.pictures[:0], labels=few.validation.labels[:0])
    )
    with pytest.raises(DataError, match="no validation pictures"):
        finetune(demo(), none, settings=QUICK, progress=lambda _: pytest.fail("it has begun"))
    with pytest.raises(DataError, match="no pictures to evaluate"):
        evaluate(demo(), [])


def test_a_folder_without_room_is_noticed_at_once(few: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began = lambda _: pytest.fail("it has begun")  # noqa: E731
    (tmp_path / "file").write_text("")
    with pytest.raises(NmfxError, match="cannot be written"):
        finetune(demo(), few, settings=QUICK, folder=tmp_path / "file" / "run", progress=began)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
        with pytest.raises(NmfxError, match="bytes are to be written there, and 1,000 are free"):
            finetune(demo(), few, settings=QUICK, folder=tmp_path / "run", progress=began)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_one_batch_is_an_epoch_and_mixed_labels_go_with_a_teacher(few: Data) -> None:
    settings = replace(QUICK, batch_size=320, distill=0.5, smoothing=0.1, augment=Augment(mixup=0.4, cutmix=0.5), amp="bf16")
    said: list[Progress] = []
    result = finetune(demo(decay=0.0), few, settings=settings, teacher=load_demo(trained=True), progress=said.append)
    assert [(now.step, now.steps) for now in said] == [(0, 1), (0, 1)]
    assert math.isfinite(result.epochs[-1].train_loss)


def test_other_classes_are_refused(few: Data) -> None:
    with pytest.raises(DataError, match="10 classes"):
        finetune(nn.Sequential(nn.Flatten(), nn.Linear(64, 7)), few, settings=QUICK)


# Losses.


def test_auxiliary_heads_count_as_in_their_papers() -> None:
    main, a, b = (torch.randn(4, 5) for _ in range(3))
    label = torch.tensor([0, 1, 2, 3])
    loss = lambda logits: nn.functional.cross_entropy(logits, label)  # noqa: E731
    assert torch.isclose(task_loss(GoogLeNetOutputs(main, a, b), label), loss(main) + 0.3 * (loss(a) + loss(b)))
    assert torch.isclose(task_loss(InceptionOutputs(main, a), label), loss(main) + 0.4 * loss(a))
    for outputs in (main, (main, a), [main, a], {"out": main, "aux": a}, InceptionOutputs(main, None)):
        assert torch.equal(task_loss(outputs, label), loss(main))
    shares = nn.functional.one_hot(label, 5).float()
    assert torch.isclose(task_loss(main, shares), loss(main))
    smooth = nn.functional.cross_entropy(main, label, label_smoothing=0.1)
    assert torch.isclose(task_loss(main, label, 0.1), smooth)


def test_distillation_by_hand() -> None:
    logits, teacher, settings = torch.randn(4, 5), torch.randn(4, 5), replace(QUICK, distill=0.25, temperature=2.0)
    p, q = (x / 2 for x in (teacher, logits))
    divergence = (p.softmax(1) * (p.log_softmax(1) - q.log_softmax(1))).sum(1).mean() * 4
    assert torch.isclose(distilled(torch.tensor(3.0), logits, teacher, settings), 0.75 * 3 + 0.25 * divergence)
    assert distilled(torch.tensor(3.0), teacher, teacher, replace(settings, distill=1.0)) == pytest.approx(0, abs=1e-6)
    with pytest.raises(NmfxError, match=r"the teacher gives \(4, 6\)"):
        distilled(torch.tensor(3.0), logits, torch.randn(4, 6), settings)


def test_agreement_with_a_reference(few: Data) -> None:
    model, other = demo(), load_demo(trained=True)
    loader = validation_loader(few, picture_config(other, few), batch_size=32)
    with torch.no_grad():
        answers = [(model(x).argmax(1) == other(x).argmax(1)).float() for x, _ in loader]
    found = evaluate(model, loader, reference=other)
    assert found.agreement == pytest.approx(float(torch.cat(answers).mean()), abs=1e-6)
    assert evaluate(other, loader, reference=other).agreement == 1
    assert evaluate(model, loader).agreement is None
