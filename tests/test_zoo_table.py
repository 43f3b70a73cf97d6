"""Laws of the measured table: what is written is read, what is not as written is refused, and a new measurement agrees."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from cases import cases

from nmfx.errors import ModelError
from nmfx.models.coverage import find_coverage, measure
from nmfx.models.source import find_source, list_models, versions
from nmfx.models.table import PACKAGED, Entry, Table, load_table, parse_table
from nmfx.passes.transform import transform

ENTRIES = (
    Entry("timm:resnet50", 25_557_032, 54, 25_502_912, 4_089_184_256, 1, 1.0, "exact"),
    Entry("torchvision:fcos_resnet50_fpn", 32_322_720, 72, 32_300_000, 10**12, 7, 0.998, "eval"),
    Entry("timm:vit_giant", 10**9, 160, 10**9 - 1, 10**12, 1, 1.0),
)
TABLE = Table("2026-01-31", {"torch": "2.9.0", "timm": "1.0.20"}, {entry.model: entry for entry in ENTRIES})
TEXT = """\
# measured 2026-01-31 with torch 2.9.0, timm 1.0.20
model,parameters,sites,weights,macs,parts,reach,numerics
timm:resnet50,25557032,54,25502912,4089184256,1,1,exact
torchvision:fcos_resnet50_fpn,32322720,72,32300000,1000000000000,7,0.998,eval
timm:vit_giant,1000000000,160,999999999,1000000000000,1,1,
"""


def test_the_table_as_text() -> None:
    assert TABLE.to_csv() == TEXT
    assert parse_table(TEXT) == TABLE


def test_share_is_of_all_parameters() -> None:
    assert ENTRIES[0].share == 25_502_912 / 25_557_032
    assert Entry("timm:empty", 0, 0, 0, 0, 1, 1.0).share == 0


ROW = "timm:resnet50,25557032,54,25502912,4089184256,1,1,exact"
BAD = {
    "empty": ("", r"line 1: expected '# measured"),
    "no head": (TEXT.partition("\n")[2], r"line 1: expected '# measured .* found 'model,"),
    "no date": (TEXT.replace("2026-01-31", "today"), "line 1: expected"),
    "no versions": (TEXT.replace("torch 2.9.0, timm 1.0.20", ""), "line 1: expected"),
    "no columns": (TEXT.splitlines()[0], "line 2: expected the columns model,parameters"),
    "other columns": (TEXT.replace("sites", "places"), "line 2: expected the columns"),
    "short row": (TEXT.replace(ROW, ROW.rpartition(",")[0]), "line 3: expected 8 cells, found 7"),
    "blank line": (TEXT.replace(ROW, ""), "line 3: expected 8 cells, found 0"),
    "word": (TEXT.replace("25557032", "many"), "line 3: invalid literal.*'many'"),
    "fraction": (TEXT.replace(",54,", ",54.0,"), "line 3: invalid literal"),
    "more weights than parameters": (TEXT.replace("25502912", "35502912"), "line 3: timm:resnet50: 54 sites of 35502912"),
    "negative": (TEXT.replace(",54,", ",-54,"), "line 3: timm:resnet50: -54 sites"),
    "reach": (TEXT.replace("0.998", "1.5"), r"line 4: torchvision:fcos_resnet50_fpn: reach 1\.5 is not a share"),
    "no number": (TEXT.replace("0.998", "nan"), "line 4: .*reach nan"),
    "numerics": (TEXT.replace("exact", "nearly"), "line 3: timm:resnet50: numerics 'nearly'"),
    "no prefix": (TEXT.replace("timm:resnet50", "resnet50"), "line 3: 'resnet50' is not a model name"),
    "twice": (TEXT.replace("timm:vit_giant", "timm:resnet50"), "line 5: timm:resnet50 appears twice"),
    "open quote": (TEXT.replace("timm:resnet50", '"timm:resnet50'), "line 3: "),
}


@cases(BAD)
def test_what_is_not_as_written_is_refused(name: str) -> None:
    content, message = BAD[name]
    with pytest.raises(ModelError, match=f"^measured: {message}"):
        parse_table(content, "measured")


def test_the_packaged_table() -> None:
    table = load_table()
    assert table is load_table()
    assert table.versions.keys() == versions().keys()
    assert table.to_csv() == PACKAGED.read_text(encoding="utf-8")
    assert list(table.entries) == [entry.model for entry in table.entries.values()]
    assert all(entry.sites > 0 and entry.weights > 0 for entry in table.entries.values())


@pytest.mark.skipif(load_table().versions != versions(), reason="other versions of the libraries are installed")
def test_the_packaged_table_lists_models_in_order() -> None:
    known, names = list_models(), list(load_table().entries)
    assert names == [name for name in known if name in load_table().entries]


MEASURED = ["torchvision:resnet18", "torchvision:ssdlite320_mobilenet_v3_large", "torchvision:raft_small"]


@pytest.mark.filterwarnings("ignore")  # of the models themselves
@pytest.mark.skipif(load_table().versions != versions(), reason="other versions of the libraries are installed")
@cases(MEASURED)
def test_a_measurement_now_agrees(name: str) -> None:
    assert measure(find_source(name)) == replace(load_table().entries[name], numerics="")


def test_coverage_is_the_same_before_and_after_conversion() -> None:
    from nmfx.models.census import find_sites

    model = find_source("torchvision:raft_small").build_meta()
    sites = find_sites(model)
    plain, masked = find_coverage(model, sites), find_coverage(transform(model, "2:4", sites=sites), sites)
    assert plain == masked
    assert plain.parts > 1
    assert re.match(r"RAFT: torch\.fx cannot trace it at the root", plain.why)


def test_every_model_that_is_installed_here_was_measured() -> None:
    table = load_table()
    if any(table.versions[name] != versions()[name] for name in ("timm", "torchvision")):
        pytest.skip(f"measured with {table.versions}")
    names = set(list_models())
    assert names <= set(table.entries)
    assert all(entry.reach > 0.95 for entry in table.entries.values())
    assert all(entry.numerics == "exact" for entry in table.entries.values() if entry.parameters <= 60e6)
