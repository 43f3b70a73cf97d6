"""Laws of the scheme: a file is the scheme it was written from, a total is what masks keep, and a wrong file is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
import yaml
from awkward import build
from cases import cases
from torch import nn

from nmfx.errors import NmfxError, SchemeError
from nmfx.masking.sites import masked_sites
from nmfx.models.census import find_sites
from nmfx.models.example import Example
from nmfx.models.site import Site, Sites
from nmfx.passes.transform import transform
from nmfx.scheme import Scheme, fit, published_keys, shapes_of
from nmfx.sparsity.pattern import Pattern

PUBLISHED = Path(__file__).parent / "data" / "resnet50_m16_0.80.txt"


class Net(nn.Module):
    """Six sites: rows of 3, 16, a depthwise 1, 24, 24 and 20 input channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 3, padding=1)
        self.depthwise, self.point = nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.Conv2d(24, 20, 1)
        self.grouped, self.head = nn.Conv2d(20, 8, 1, groups=2), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.grouped(self.point(self.depthwise(self.wide(self.stem(x)))))
        return self.head(x.mean((2, 3)))


def sites_of(model: nn.Module) -> Sites:
    return find_sites(model, torch.empty(1, 3, 6, 6))


@pytest.fixture
def sites() -> Sites:
    return sites_of(Net())


def make_site(*shape: int, conv_groups: int = 1) -> Site:
    rows = (shape[0], shape[1], math.prod(shape[2:]))
    return Site("w", "conv2d", shape, rows, math.prod(shape) * 10, 1, math.prod(shape) * 4, (("", "w"),), conv_groups)


# The published scheme of ResNet-50 (domino.md, section 7).


@pytest.fixture(scope="module")
def resnet50() -> Sites:
    with torch.device("meta"):
        return find_sites(torchvision.models.resnet50())


def test_the_published_scheme_is_counted_exactly(resnet50: Sites) -> None:
    scheme = Scheme.load(PUBLISHED, resnet50)
    totals = scheme.totals(resnet50)
    assert len(resnet50) == 54
    assert (totals.weights, totals.kept) == (25_502_912, 4_907_200)
    assert (totals.macs, totals.kept_macs) == (4_089_184_256, 1_141_313_536)
    assert round(totals.sparsity, 5) == 0.80758
    assert str(scheme["fc.weight"]) == "4:16"
    assert "conv1.weight" not in scheme


def test_the_published_scheme_is_written_back_to_the_same_text(resnet50: Sites, tmp_path: Path) -> None:
    scheme = Scheme.load(PUBLISHED, resnet50)
    assert scheme.to_published(resnet50).strip() == PUBLISHED.read_text().strip()
    scheme.save(tmp_path / "by-yaml.yaml", resnet50)
    Scheme.load(tmp_path / "by-yaml.yaml", resnet50).save(tmp_path / "again.txt", resnet50)
    assert (tmp_path / "again.txt").read_text().strip() == PUBLISHED.read_text().strip()


def test_the_published_scheme_converts_the_model(resnet50: Sites) -> None:
    model = transform(torchvision.models.resnet50(), PUBLISHED, sites=resnet50, inplace=True)
    nonzeros = sum(int(getattr(site.owner, site.attr).count_nonzero()) for site in masked_sites(model))
    dense = sum(site.weights for site in resnet50 if site.name not in Scheme.load(PUBLISHED, resnet50))
    assert nonzeros + dense == 4_907_200


@pytest.mark.parametrize(
    "text",
    [
        "{'a': __import__('os').system('touch PWNED')}",
        "{'a': [__import__('os').system('touch PWNED'), 16]}",
        "{**open('PWNED', 'w').__dict__}",
        "{x: [4, 16] for x in [open('PWNED', 'w')]}",
        "{'a': [4, 16]}; open('PWNED', 'w')",
        "{" * 5000,
    ],
    ids=["value", "inside", "star", "comprehension", "statement", "deep"],
)
def test_a_malicious_text_is_refused_not_run(text: str, sites: Sites, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scheme.txt").write_text(text)
    with pytest.raises(SchemeError, match=r"scheme\.txt"):
        Scheme.load("scheme.txt", sites)
    assert [path.name for path in tmp_path.iterdir()] == ["scheme.txt"]


def test_a_malicious_yaml_is_refused_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = "nmfx: scheme\nversion: 1\npatterns: !!python/object/apply:os.system ['touch PWNED']\n"
    (tmp_path / "scheme.yaml").write_text(content)
    with pytest.raises(SchemeError):
        Scheme.load("scheme.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["scheme.yaml"]


def published(sites: Sites, pattern: tuple[int, int]) -> str:
    return str({key: list(pattern) for key in published_keys(sites).values()})


BAD_ENTRIES = {
    "more kept than there are": [5, 4],
    "zero": [0, 16],
    "one number": [4],
    "three numbers": [4, 16, 2],
    "none": None,
    "a fraction": [4.5, 16],
    "infinity": [1e999, 16],
    "true": [True, 16],
}


@cases(BAD_ENTRIES)
def test_a_malformed_published_entry_is_refused(name: str, resnet50: Sites) -> None:
    key = "'SparseConv3_64-256-(1, 1)': "
    text = published(resnet50, (16, 16)).replace(f"{key}[16, 16]", f"{key}{BAD_ENTRIES[name]}")
    with pytest.raises(SchemeError):
        Scheme.from_published(text.replace("[inf, 16]", "[1e999, 16]"), resnet50)


def test_published_layers_must_be_the_models(resnet50: Sites, sites: Sites) -> None:
    text = published(resnet50, (16, 16))
    with pytest.raises(SchemeError, match=r"SparseConv0_3-64-\(7, 7\).*Net has 'SparseConv0_3-16-\(3, 3\)'"):
        Scheme.from_published(text, sites)
    with pytest.raises(SchemeError, match=r"has 53 layers, ResNet has 54"):
        Scheme.from_published(text.replace(", 'Linear0_2048-1000': [16, 16]", ""), resnet50)
    with pytest.raises(SchemeError, match="sites="):
        Scheme.load(PUBLISHED)


def test_the_published_format_says_only_what_it_can(sites: Sites, tmp_path: Path) -> None:
    short = Scheme.uniform(sites, "2:16", remainder="short")
    with pytest.raises(SchemeError, match="short groups"):
        short.save(tmp_path / "scheme.txt", sites)
    model, example = build("transposed")
    transposed = find_sites(model, example)
    with pytest.raises(SchemeError, match=r"up1\.weight"):
        Scheme({"up1.weight": "2:4"}).to_published(transposed)
    assert list(tmp_path.iterdir()) == []


# The YAML file.

SCHEMES: dict[str, Callable[[Sites], Scheme]] = {
    "empty": lambda sites: Scheme({}),
    "bare": lambda sites: Scheme({"wide.weight": "2:4", "head.weight": "3:8"}),
    "uniform": lambda sites: Scheme.uniform(sites, "2:4"),
    "smaller": lambda sites: Scheme.uniform(sites, "2:16", remainder="smaller"),
    "short": lambda sites: Scheme.uniform(sites, "1:16", remainder="short"),
    "flat": lambda sites: Scheme.uniform(sites, "2:4", layout="flat"),
    "info": lambda sites: replace(
        Scheme.uniform(sites, "2:4"),
        info={"model": "timm:a.b_c", "weights": "random", "method": "domino", "budget": "macs", "target": "0.875", "m": "4"},
    ),
    "awkward info": lambda sites: replace(
        Scheme({"wide.weight": "2:4"}), info={"model": "a: b # 'c'\n\"d\" é 1e-3 2:4", "weights": "no"}
    ),
}


@cases(SCHEMES)
def test_yaml_gives_the_scheme_back(name: str, sites: Sites, tmp_path: Path) -> None:
    scheme = SCHEMES[name](sites)
    scheme.save(tmp_path / "bare.yaml")
    assert Scheme.load(tmp_path / "bare.yaml") == scheme
    scheme.save(tmp_path / "full.yaml", sites)
    full = Scheme.load(tmp_path / "full.yaml", sites)
    assert full == replace(scheme, shapes=shapes_of(sites), info={**scheme.info, "sites": sites.fingerprint})
    full.save(tmp_path / "again.yaml", sites)
    assert yaml.safe_load((tmp_path / "again.yaml").read_text()) == yaml.safe_load((tmp_path / "full.yaml").read_text())
    assert full.totals(sites) == scheme.totals(sites)


def test_a_published_scheme_survives_yaml(resnet50: Sites) -> None:
    scheme = Scheme.load(PUBLISHED, resnet50)
    assert Scheme.from_yaml(scheme.to_yaml()) == scheme


def test_the_file_carries_what_a_reader_wants(sites: Sites) -> None:
    scheme = replace(Scheme.uniform(sites, "2:4"), info={"model": "timm:net", "m": "4", "budget": "params", "target": "0.5"})
    tree = yaml.safe_load(scheme.to_yaml(sites))
    totals = scheme.totals(sites)
    assert (tree["nmfx"], tree["version"], tree["model"], tree["layout"]) == ("scheme", 1, "timm:net", "strict")
    assert tree["totals"]["weights"] == totals.weights == sites.weights
    assert (tree["totals"]["kept"], tree["totals"]["kept_macs"]) == (totals.kept, totals.kept_macs)
    assert tree["sites"] == sites.fingerprint
    assert list(tree["patterns"]) == [site.name for site in sites]
    assert tree["patterns"]["wide.weight"] == "2:4", "quoted, so that YAML 1.1 reads text and not 124"


@pytest.mark.parametrize("spelling", ["2:4", "'2:4'", '"2:4"', " 2:4 ", "2 :4"])
def test_two_to_four_is_a_pattern_in_every_spelling(spelling: str) -> None:
    scheme = Scheme.from_yaml(f"nmfx: scheme\nversion: 1\npatterns:\n  a.weight: {spelling}\n")
    assert scheme == Scheme({"a.weight": "2:4"})


def test_yaml_1_1_traps() -> None:
    scheme = Scheme.from_yaml(
        "nmfx: scheme\nversion: 1\nmodel: no\ntarget: 1e-3\nm: 010\npatterns: {on: 1:30, 1: 2:4, ~: dense}\n"
    )
    assert dict(scheme) == {"on": Pattern(1, 30), "1": Pattern(2, 4)}
    assert scheme.info == {"model": "no", "target": "1e-3", "m": "010"}


HEAD = "nmfx: scheme\nversion: 1\n"
MALFORMED = {
    "unknown key": (HEAD + "paterns: {}\n", r"unknown key 'paterns' \(did you mean 'patterns'\?\)"),
    "duplicate key": (HEAD + "m: 4\nm: 8\n", "'m' appears twice"),
    "duplicate site": (HEAD + "patterns: {a.w: 1:4, b.w: 1:4, a.w: 2:4}\n", r"'a\.w' appears twice"),
    "newer version": ("nmfx: scheme\nversion: 2\n", r"version 2, this nmfx reads version 1"),
    "another file of ours": ("nmfx: work\nversion: 1\n", "not a scheme file"),
    "another file": ("name: CI\non: push\n", "not a scheme file"),
    "empty": ("", "expected a YAML mapping"),
    "a list": ("- 2:4\n", "expected a YAML mapping"),
    "not yaml": ("a: [1\nb: }", "not valid YAML"),
    "no pattern": (HEAD + "patterns: {a.w: 2-4}\n", r"'2-4' is not an N:M pattern"),
    "the number 124": (HEAD + "patterns: {a.w: 124}\n", r"'124' is not an N:M pattern"),
    "M first": (HEAD + "patterns: {a.w: 4:2}\n", r"did you mean '2:4'"),
    "N of nothing": (HEAD + "patterns: {a.w: 0:4}\n", "1 <= N"),
    "M too large": (HEAD + "patterns: {a.w: 2:65}\n", "<= 64"),
    "a list for a pattern": (HEAD + "patterns: {a.w: [2, 4]}\n", "scheme"),
    "patterns as a list": (HEAD + "patterns: [2:4]\n", "should map weight names"),
    "shape": (HEAD + "shapes: {a.w: 3xx4}\n", "scheme"),
    "shape as a list": (HEAD + "shapes: {a.w: [3, 4]}\n", "scheme"),
    "layout": (HEAD + "layout: flatt\n", "layout 'flatt'"),
    "short": (HEAD + "short: yes\n", "short 'yes'"),
    "a list for a key": (HEAD + "[patterns]: {}\n", "scheme"),
    "a mapping for a key": (HEAD + "{patterns: x}: {}\n", "scheme"),
    "deep nesting": (HEAD + "patterns: " + "[" * 5000, "scheme"),
    "a bomb": (HEAD + "patterns: &a {b: *a}\n", "scheme"),
    "a NUL": (HEAD + "patterns: {a\0: 2:4}\n", "not valid YAML"),
}


@cases(
    MALFORMED,
)
def test_a_malformed_file_says_what_is_wrong(name: str, tmp_path: Path) -> None:
    content, message = MALFORMED[name]
    (tmp_path / "scheme.yaml").write_text(content)
    with pytest.raises(SchemeError, match=message) as caught:
        Scheme.load(tmp_path / "scheme.yaml")
    assert str(tmp_path / "scheme.yaml") in str(caught.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00binary\x80"], ids=["missing", "binary"])
def test_what_is_no_text_is_refused(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "scheme.yaml").write_bytes(content)
    with pytest.raises(SchemeError, match=r"scheme\.yaml"):
        Scheme.load(tmp_path / "scheme.yaml")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SchemeError, match="cannot be read"):
        Scheme.load(tmp_path)


# A scheme and a model that do not match.


MISMATCHES: dict[str, tuple[Callable[[Net], Any], str]] = {
    "shape": (
        lambda net: net.__setattr__("point", nn.Conv2d(24, 20, 1, groups=2)),
        r"point\.weight: the scheme was made for shape \(20, 24, 1, 1\), the model has \(20, 12, 1, 1\)",
    ),
    "first of two": (
        lambda net: (
            net.__setattr__("wide", nn.Conv2d(16, 24, 1)),
            net.__setattr__("grouped", nn.Conv2d(20, 8, 1)),
        ),
        r"^(\S*scheme\.yaml: )?[^:]*wide\.weight",
    ),
    "gone": (lambda net: net.__setattr__("head", nn.Identity()), r"head\.weight \(5, 8\): in the scheme, but no site of Net"),
    "moved": (
        lambda net: net.__setattr__("head", nn.Sequential(net.head, nn.Linear(5, 5))),
        r"head\.weight \(5, 8\): in the scheme, but no site of Net \(it was made for the:original\)",
    ),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_another_model_is_refused_by_the_first_difference(name: str, sites: Sites, tmp_path: Path) -> None:
    change, message = MISMATCHES[name]
    scheme = replace(Scheme.uniform(sites, "2:4"), info={"model": "the:original"})
    scheme.save(tmp_path / "scheme.yaml", sites)
    net = Net()
    change(net)
    other = sites_of(net)
    for use in (
        lambda: Scheme.load(tmp_path / "scheme.yaml", other),
        lambda: scheme.check(other),
        lambda: scheme.totals(other),
        lambda: transform(net, scheme, sites=other),
    ):
        with pytest.raises(SchemeError, match=message):
            use()


def test_a_site_that_the_scheme_does_not_know_is_a_difference(sites: Sites) -> None:
    scheme = Scheme.uniform(sites, "2:4")
    extra = replace(make_site(8, 8), name="late.weight")
    with pytest.raises(SchemeError, match=r"late\.weight \(8, 8\): a site of the model that the scheme does not know"):
        scheme.check(Sites((*sites, extra)))


class Turned(nn.Linear):
    """Reads its weight as (in, out)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def test_the_same_shapes_used_otherwise_are_a_difference() -> None:
    mine, theirs = (find_sites(cls(8, 8, bias=False), torch.empty(2, 8)) for cls in (nn.Linear, Turned))
    assert shapes_of(mine) == shapes_of(theirs)
    scheme = Scheme.from_yaml(Scheme({"weight": "2:4"}).to_yaml(mine))
    scheme.check(mine)
    with pytest.raises(SchemeError, match="used otherwise"):
        scheme.check(theirs)


def test_a_bare_scheme_names_what_the_model_has_not(sites: Sites) -> None:
    with pytest.raises(SchemeError, match=r"nothing\.weight: not a site"):
        Scheme({"nothing.weight": "2:4"}).check(sites)
    with pytest.raises(SchemeError, match=r"stem\.weight: 2:4 needs the group axis \(in=3\) to divide by 4"):
        Scheme({"stem.weight": "2:4"}).check(sites)


# Values, rules and globs.


def test_a_scheme_is_a_mapping_of_what_is_sparse() -> None:
    scheme = Scheme({"a": "2:4", "b": Pattern(4, 4), "c": Pattern(1, 8)})
    assert dict(scheme) == {"a": Pattern(2, 4), "c": Pattern(1, 8)}
    assert "b" not in scheme
    assert len(scheme) == 2
    assert scheme == Scheme({"a": "2:4", "c": "1:8"})
    with pytest.raises(NmfxError, match="N:M"):
        Scheme({"a": "half"})


@pytest.mark.parametrize(
    ("rules", "keep", "expected"),
    [
        ({"*": "2:4"}, [], {"wide": "2:4", "point": "2:4", "head": "2:4"}),
        ({"*": "2:4"}, ["head*"], {"wide": "2:4", "point": "2:4"}),
        ({"*": "2:4"}, ["head.weight", "w?de.*"], {"point": "2:4"}),
        ({"wide.weight": "1:16", "*": "2:4"}, [], {"wide": "1:16", "point": "2:4", "head": "2:4"}),
        ({"*": "2:4", "wide.weight": "1:16"}, [], {"wide": "2:4", "point": "2:4", "head": "2:4"}),
        ({"[wp]*.weight": "1:8"}, [], {"wide": "1:8", "point": "1:8"}),
        ({"head.weight": "8:8", "*": "4:8"}, [], {"wide": "4:8", "point": "4:8"}),
        ({"grouped.weight": "3:5"}, [], {"grouped": "3:5"}),
    ],
    ids=["all", "keep", "keep two", "first wins", "star first", "class", "dense rule", "conv groups"],
)
def test_the_first_rule_that_matches_counts(
    rules: dict[str, str], keep: list[str], expected: dict[str, str], sites: Sites
) -> None:
    scheme = Scheme.from_rules(sites, rules, keep_dense=keep)
    assert scheme.patterns == {f"{name}.weight": Pattern(pattern) for name, pattern in expected.items()}
    assert scheme.shapes == shapes_of(sites)


@pytest.mark.parametrize("glob", ["*", "head.weight"])
def test_keep_dense_outranks_a_rule_of_the_same_name(glob: str, sites: Sites) -> None:
    assert "head.weight" not in Scheme.from_rules(sites, {glob: "2:4"}, keep_dense=[glob])
    assert not Scheme.uniform(sites, "2:4", keep_dense=["*"])


def test_globs_see_the_case_of_letters(sites: Sites) -> None:
    with pytest.raises(SchemeError, match=r"no site matches 'WIDE\*'"):
        Scheme.from_rules(sites, {"WIDE*": "2:4"})


@pytest.mark.parametrize("keep", [False, True], ids=["rule", "keep"])
def test_a_glob_that_matches_nothing_is_an_error_with_the_nearest_name(keep: bool, sites: Sites) -> None:
    rules = {"*": "2:4"} if keep else {"wide.wieght": "2:4"}
    with pytest.raises(SchemeError, match=r"no site matches 'wide\.wieght' \(did you mean 'wide\.weight'\?\)"):
        Scheme.from_rules(sites, rules, keep_dense=["wide.wieght"] if keep else [])


@pytest.mark.parametrize("name", ["stem", "depthwise"])
def test_a_rule_that_names_a_site_must_fit_it(name: str, sites: Sites) -> None:
    with pytest.raises(SchemeError, match=rf"{name}\.weight: 2:4 needs the group axis"):
        Scheme.from_rules(sites, {f"{name}.weight": "2:4"})
    assert f"{name}.weight" not in Scheme.from_rules(sites, {f"{name}.*": "2:4"})


# What becomes of rows that M does not divide.

DEPTHWISE = {"shape": (32, 1, 3, 3), "conv_groups": 32}
FIT = [  # layout, remainder, shape, conv groups, wanted, given, reason
    ("strict", "dense", (8, 32, 3, 3), 1, "4:16", "4:16", ""),
    ("strict", "smaller", (8, 32, 3, 3), 1, "4:16", "4:16", ""),
    ("strict", "short", (8, 32, 3, 3), 1, "4:16", "4:16", ""),
    ("strict", "dense", (8, 24, 3, 3), 1, "4:16", "dense", "in=24 does not divide by 16"),
    ("strict", "smaller", (8, 24, 3, 3), 1, "4:16", "3:12", "M = 12 instead"),
    ("strict", "smaller", (8, 24, 3, 3), 1, "1:16", "1:12", "M = 12 instead"),
    ("strict", "smaller", (8, 24, 3, 3), 1, "8:16", "6:12", "M = 12 instead"),
    ("strict", "short", (8, 24, 3, 3), 1, "4:16", "4:16", ""),
    ("strict", "dense", (64, 3, 7, 7), 1, "2:4", "dense", "in=3 does not divide by 4"),
    ("strict", "smaller", (64, 3, 7, 7), 1, "2:4", "2:3", "M = 3 instead"),
    ("strict", "smaller", (64, 3, 7, 7), 1, "1:16", "1:3", "M = 3 instead"),
    ("strict", "short", (64, 3, 7, 7), 1, "2:4", "2:4", ""),
    ("strict", "short", (64, 3, 7, 7), 1, "3:4", "dense", "in=3 is not more than N=3"),
    ("strict", "short", (64, 3, 7, 7), 1, "4:16", "dense", "in=3 is not more than N=4"),
    ("strict", "smaller", (8, 13), 1, "2:4", "dense", "in=13 does not divide by 4"),
    ("strict", "smaller", (8, 13), 1, "2:16", "2:13", "M = 13 instead"),
    ("strict", "dense", (32, 1, 3, 3), 32, "2:4", "dense", "depthwise"),
    ("strict", "smaller", (32, 1, 3, 3), 32, "2:4", "dense", "depthwise"),
    ("strict", "short", (32, 1, 3, 3), 32, "1:4", "dense", "depthwise"),
    ("strict", "short", (32, 1, 3, 3), 1, "1:4", "dense", "one input channel"),
    ("flat", "dense", (64, 3, 7, 7), 1, "4:16", "4:16", ""),
    ("flat", "dense", (32, 1, 3, 3), 32, "4:16", "4:16", ""),
    ("flat", "dense", (5, 3, 7, 7), 1, "4:16", "dense", "735 weights do not divide by 16"),
    ("flat", "dense", (10, 8), 1, "4:16", "4:16", ""),
    ("strict", "dense", (7, 7), 1, "5:5", "5:5", ""),
]


@pytest.mark.parametrize(
    ("layout", "remainder", "shape", "conv_groups", "wanted", "given", "reason"),
    FIT,
    ids=[f"{row[0]}-{row[1]}-{'x'.join(map(str, row[2]))}{'-groups' * (row[3] > 1)}-{row[4]}" for row in FIT],
)
def test_fit(
    layout: Any, remainder: Any, shape: tuple[int, ...], conv_groups: int, wanted: str, given: str, reason: str
) -> None:
    found, why = fit(make_site(*shape, conv_groups=conv_groups), Pattern(wanted), layout, remainder)
    assert found == (Pattern.DENSE if given == "dense" else Pattern(given))
    assert (reason in why) if reason else not why


@pytest.mark.parametrize("remainder", ["dense", "smaller", "short"])
@pytest.mark.parametrize("layout", ["strict", "flat"])
def test_what_fits_can_be_cut_and_is_not_denser_than_it_must_be(layout: Any, remainder: Any) -> None:
    for length in range(1, 40):
        for m in (2, 4, 7, 16):
            for n in range(1, m):
                site = make_site(4, length, 3)
                pattern, reason = fit(site, Pattern(n, m), layout, remainder)
                scheme = Scheme({"w": pattern}, layout, remainder == "short")
                kept = scheme.kept(site)  # raises if it cannot be cut so
                assert kept < site.weights or pattern.is_dense
                assert kept >= site.weights * n / m or pattern.is_dense
                assert bool(reason) == (pattern != Pattern(n, m))


# Totals.


def brute_force_kept(shape: tuple[int, ...], n: int, m: int, *, flat: bool) -> int:
    """Weights kept, counted group by group as domino.md section 2 cuts them."""
    out, length, taps = shape[0], shape[1], math.prod(shape[2:])
    rows = [out * length * taps] if flat and length % m else [length] * (out * taps)
    return sum(min(n, min(m, row - start)) for row in rows for start in range(0, row, m))


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "3:5", "4:16", "1:16", "5:7"])
@pytest.mark.parametrize("policy", ["dense", "smaller", "short", "flat"])
def test_totals_are_what_the_masks_keep(policy: Any, pattern: str) -> None:
    net = Net()
    sites = sites_of(net)
    layout, remainder = ("flat", "dense") if policy == "flat" else ("strict", policy)
    scheme = Scheme.uniform(sites, pattern, layout=layout, remainder=remainder)  # type: ignore[arg-type]
    converted = transform(net, scheme, sites=sites)
    kept = {site.name: site.weights for site in sites} | {
        site.spec.name: int(site.mask.sum()) for site in masked_sites(converted)
    }
    for site in sites:
        p = scheme.get(site.name, Pattern.DENSE)
        assert kept[site.name] == brute_force_kept(site.shape, p.n, p.m, flat=policy == "flat") == scheme.kept(site)
    totals = scheme.totals(sites)
    assert (totals.weights, totals.kept) == (sum(p.numel() for p in net.parameters() if p.dim() > 1), sum(kept.values()))
    # Every weight of a site is met the same number of times, so that MACs shrink with the weights kept.
    assert totals.kept_macs == sum(site.macs * kept[site.name] // site.weights for site in sites)
    assert totals.sparsity == 1 - totals.kept / totals.weights
    assert totals.mac_sparsity == 1 - totals.kept_macs / totals.macs


def test_totals_of_nothing_sparse_are_the_dense_ones(sites: Sites) -> None:
    totals = Scheme({}).totals(sites)
    assert (totals.kept, totals.kept_macs) == (totals.weights, totals.macs) == (sites.weights, sites.macs)
    assert totals.sparsity == totals.mac_sparsity == 0
    assert Scheme({}).totals(Sites(())).sparsity == 0


# Files are written whole.


def test_save_keeps_an_old_file_unless_forced(sites: Sites, tmp_path: Path) -> None:
    for name in ("scheme.yaml", "scheme.txt"):
        path = tmp_path / name
        path.write_text("mine")
        with pytest.raises(NmfxError, match="exists already"):
            Scheme.uniform(sites, "2:4").save(path, sites, force=False)
        assert path.read_text() == "mine"
        Scheme.uniform(sites, "2:4").save(path, sites)
        assert Scheme.load(path, sites) != "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scheme.txt", "scheme.yaml"]


def test_a_scheme_of_another_model_is_not_saved(sites: Sites, tmp_path: Path) -> None:
    with pytest.raises(SchemeError):
        Scheme({"nothing.weight": "2:4"}).save(tmp_path / "scheme.yaml", sites)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["tied", "twice", "attention", "listed", "products", "transposed", "conv1d"])
def test_schemes_of_awkward_models_survive(name: str, tmp_path: Path) -> None:
    model, example = build(name)
    sites = find_sites(model, Example.of(example))
    scheme = Scheme.uniform(sites, "2:4")
    assert len(scheme)
    scheme.save(tmp_path / "scheme.yaml", sites)
    assert dict(Scheme.load(tmp_path / "scheme.yaml", sites)) == dict(scheme)
