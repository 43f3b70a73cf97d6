"""Laws of options: one definition, and its three readers (Python, a YAML key, a flag) agree."""

from __future__ import annotations

import argparse
import math
from dataclasses import MISSING, replace
from typing import Any, get_args, get_type_hints

import pytest

from nmfx.cli.commands import parser
from nmfx.errors import NmfxError
from nmfx.settings.choices import Choices
from nmfx.settings.flags import add_flags, name_of, read_flags
from nmfx.settings.methods import METHODS, SENSITIVITIES, resolve
from nmfx.settings.option import Option, about, kinds_of, options_of, parse, section, values_of
from nmfx.settings.reference import PAGE, reference
from nmfx.settings.search import DominoSettings, SearchSettings
from nmfx.settings.stages import (
    BenchSettings,
    CorrectSettings,
    DataSettings,
    EvaluateSettings,
    ExportSettings,
    FinetuneSettings,
    ModelSettings,
    RecalibrateSettings,
)
from nmfx.settings.training import Augment, Settings
from nmfx.sparsity.correction import CORRECTIONS
from nmfx.stages.pipeline import STAGES

CLASSES = (
    *(Augment, Settings, Choices, DominoSettings, SearchSettings, ModelSettings, DataSettings),
    *(CorrectSettings, RecalibrateSettings, FinetuneSettings, ExportSettings, EvaluateSettings, BenchSettings),
)
NEEDED = {ModelSettings: {"name": "digits"}, DataSettings: {"name": "digits"}}
WHOLE = [cls for cls in CLASSES if cls not in NEEDED]


def test_corrections_are_those_that_there_are() -> None:
    assert get_args(get_type_hints(CorrectSettings)["method"]) == tuple(CORRECTIONS)


def numbers() -> list[tuple[type, str, Option, type]]:
    """Every number with limits: its class, key, option and kind."""
    found = []
    for cls in CLASSES:
        for key, (item, kind) in options_of(cls).items():
            kinds = [one for one in kinds_of(kind) if one in (int, float)]
            if len(kinds) == 1 and about(item).least > -math.inf and item.name in cls.__dataclass_fields__:
                found.append((cls, key, about(item), kinds[0]))
    return found


def wrong(said: Option, kind: type) -> list[float]:
    """Numbers just outside the limits."""
    values = [said.least if said.above else said.least - 1]
    if said.most < math.inf:
        values.append(said.most if said.below else said.most + 1)
    return [kind(value) for value in values]


def typed(cls: type, *argv: str) -> Any:
    """The settings that flags give."""
    one = argparse.ArgumentParser(exit_on_error=False)
    add_flags(one, cls)
    return read_flags(one.parse_args(argv), cls)


def test_there_are_numbers_to_look_at() -> None:
    assert len(numbers()) > 30


@pytest.mark.parametrize(("cls", "key", "said", "kind"), numbers(), ids=lambda x: getattr(x, "__name__", str(x))[:20])
def test_limits_are_the_same_from_python_a_key_and_a_flag(cls: type, key: str, said: Option, kind: type) -> None:
    item, _ = options_of(cls)[key]
    for value in wrong(said, kind):
        with pytest.raises(NmfxError) as python:
            cls(**NEEDED.get(cls, {}), **{key: value})
        limits = said.limits(kind is int)
        assert f"{key}={value!r}: expected " in str(python.value)
        assert limits in str(python.value)
        with pytest.raises(NmfxError) as yaml:
            section({**NEEDED.get(cls, {}), key: repr(value)}, cls, "f.yaml")
        assert f"f.yaml.{key}: expected " in str(yaml.value)
        assert limits in str(yaml.value)
        if said.flag is not None:
            with pytest.raises(argparse.ArgumentError) as flag:
                typed(cls, *(["--data", "digits"] if cls is DataSettings else []), f"{name_of(item)}={value!r}")
            assert limits in str(flag.value)


@pytest.mark.parametrize("cls", WHOLE, ids=lambda cls: cls.__name__)
def test_nothing_typed_and_nothing_written_are_the_defaults(cls: type) -> None:
    assert typed(cls) == cls() == section({}, cls, "f.yaml")


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_option_says_what_it_is(cls: type) -> None:
    for key, (item, kind) in options_of(cls).items():
        said = about(item)
        assert said.help or hasattr(kind, "__dataclass_fields__"), key
        assert said.help == said.help.strip()
        assert item.default is not MISSING or key == "name"


def test_an_inline_option_is_set_where_it_belongs() -> None:
    tree = {"method": "domino", "data": "true", "decay": "0.5", "m": "[8]", "keep_dense": ["fc"]}
    found = section({**tree, "m": ["8", "16"]}, SearchSettings, "f.yaml")
    assert (found.loop.decay, found.choices.m, found.choices.keep_dense) == (0.5, (8, 16), ("fc",))
    assert values_of(found)["decay"] == 0.5
    flags = typed(SearchSettings, "--keep-dense", "fc", "--keep-dense", "a.*", "--m", "8,16", "--limit", "params=0.5")
    assert flags.choices == replace(Choices(), m=(8, 16), keep_dense=("fc", "a.*"))
    assert flags.limits == {"params": 0.5}
    assert section({"vector": ["1", "4"]}, SearchSettings, "f.yaml").choices.vector == (1, 4)
    assert [typed(SearchSettings, "--vector", said).choices.vector for said in ("4", "1,4")] == [4, (1, 4)]


def test_classes_are_another_word_for_an_argument_of_the_builder() -> None:
    told = section({"name": "digits", "classes": "3"}, ModelSettings, "f.yaml")
    assert told == ModelSettings("digits", kwargs={"num_classes": 3})


def test_what_is_said_of_all_sites_counts_last() -> None:
    found = typed(SearchSettings, "--min-density", "0.25", "--min-density", "block3*=0.5")
    assert list(found.choices.min_density.items()) == [("block3*", 0.5), ("*", 0.25)]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], Settings()),
        (["--no-augment", "--mixup", "0.2"], Settings(augment=Augment(on=False, mixup=0.2))),
        (["--fsdp"], Settings(parallel="fsdp")),
        (["--compile"], Settings(compile="inductor")),
        (["--compile", "eager", "--amp", "bf16", "--tensorboard"], Settings(compile="eager", amp="bf16", tensorboard=True)),
    ],
)
def test_flags_of_other_forms(flags: list[str], expected: Settings) -> None:
    assert typed(Settings, *flags) == expected


def test_words_are_those_of_the_registries() -> None:
    assert all(callable(resolve(entry.function)) for entry in (*METHODS.values(), *SENSITIVITIES.values()))
    commands = next(action for action in parser()._actions if isinstance(action, argparse._SubParsersAction)).choices
    until = next(action for action in commands["run"]._actions if action.dest == "until")
    assert tuple(until.choices) == tuple(STAGES)


@pytest.mark.parametrize("text", ["1e-3", "2:4", "0o17", "yes", "1_000", "٣", "1e400", " 1", ""])
def test_yaml_1_2_and_nothing_else(text: str) -> None:
    """YAML 1.1 reads 2:4 as 124 and 1e-3 as text."""
    readings = {"1e-3": 0.001}
    if text in readings:
        assert parse(text, float, "key") == readings[text]
        return
    with pytest.raises(NmfxError, match="key: expected a number"):
        parse(text, float, "key")


def test_the_reference_page_is_what_the_definitions_give() -> None:
    assert PAGE.read_text() == reference(), "python -m nmfx.settings.reference writes it"
    for cls in CLASSES:
        for key, (item, _) in options_of(cls).items():
            assert about(item).flag is None or f"`{name_of(item)}`" in reference() or key == "augment", key


def test_every_kind_of_setting_is_frozen() -> None:
    for cls in CLASSES:
        one = cls(**NEEDED.get(cls, {}))
        with pytest.raises(AttributeError):
            one.seed = 1
