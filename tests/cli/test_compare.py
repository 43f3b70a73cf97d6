"""Laws of nmfx compare: it says where schemes differ and what each keeps; schemes of other networks are refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision

from nmfx.cli.main import main
from nmfx.demo.digits import load_demo
from nmfx.export.checkpoint import save_checkpoint
from nmfx.models.census import find_sites
from nmfx.models.site import Sites
from nmfx.passes.transform import transform
from nmfx.scheme import Scheme
from nmfx.search.finder import find_scheme
from nmfx.stages import report as report_io

MODEL = "torchvision:resnet18"


@pytest.fixture(scope="module")
def sites() -> Sites:
    with torch.device("meta"):
        model = torchvision.models.resnet18()
    return find_sites(model, torch.empty(1, 3, 224, 224))


@pytest.fixture
def compare(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*argv: str) -> str:
        assert main(("compare", *argv)) == 0, capsys.readouterr().err
        out = capsys.readouterr().out
        assert "\x1b" not in out
        return out

    return run


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str], here: Path) -> Callable[..., str]:
    def run(*argv: str) -> str:
        before = sorted(here.rglob("*"))
        assert main(("compare", *argv)) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert sorted(here.rglob("*")) == before
        return error.strip()

    return run


def write(name: str, scheme: Scheme, sites: Sites, model: str = MODEL) -> Scheme:
    made = Scheme(
        scheme.patterns, scheme.layout, info={"model": model, "method": "uniform", "budget": "params", "target": "0.5"}
    )
    made.save(name, sites)
    return made


def test_differences_and_totals(compare: Callable[..., str], sites: Sites) -> None:
    first = Scheme.uniform(sites, "2:4")
    second = Scheme({**first.patterns, "layer2.0.conv1.weight": "1:4", "fc.weight": "4:4"})
    write("a.yaml", first, sites)
    write("b.yaml", second, sites)
    out = compare("a.yaml", "b.yaml")
    assert f"{MODEL}: 2 schemes, {len(sites)} sites" in out
    assert re.search(r"^layer2\.0\.conv1\.weight +2:4 +1:4 +\*", out, re.MULTILINE)
    assert re.search(r"^fc\.weight +2:4 +dense +\*", out, re.MULTILINE)
    assert "layer1.0.conv1.weight" not in out
    assert f"2 of {len(sites)} sites differ" in out
    folded = [int(n) for n in re.findall(r"^\.\.\. (\d+) that agree", out, re.MULTILINE)]
    assert sum(folded) == len(sites) - 2
    for letter, scheme, unlike in (("A", first, "-"), ("B", second, "2")):
        t = scheme.totals(sites)
        row = [letter, f"{t.kept:,}", f"{t.sparsity:.3%}", f"{t.kept_macs:,}", f"{t.mac_sparsity:.3%}", unlike]
        assert re.search(rf"^{' +'.join(map(re.escape, row))}\s*$", out, re.MULTILINE)


def test_all_lists_every_site(compare: Callable[..., str], sites: Sites) -> None:
    write("a.yaml", Scheme.uniform(sites, "2:4"), sites)
    out = compare("a.yaml", "a.yaml", "--all")
    assert all(re.search(rf"^{re.escape(site.name)} ", out, re.MULTILINE) for site in sites)
    assert f"the same pattern at all {len(sites)} sites" in out
    assert "that agree" not in out


@pytest.mark.parametrize("columns", [80, 120])
def test_no_line_is_wider_than_the_terminal(
    compare: Callable[..., str], sites: Sites, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    names = [f"{p.replace(':', 'of')}.yaml" for p in ("1:16", "2:16", "4:16", "8:16", "1:4")]
    for name in names:
        write(name, Scheme.uniform(sites, name.removesuffix(".yaml").replace("of", ":")), sites)
    out = compare(*names)
    assert max(map(len, out.splitlines())) <= columns
    assert "layer3.0.downsample.0.weight" in out


def test_published_checkpoint_and_work_directory(compare: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(("convert", "demo:digits", "--pattern", "2:16")) == 0
    model = load_demo(trained=True)
    sites = find_sites(model, torch.empty(1, 1, 8, 8))
    scheme = Scheme.uniform(sites, "4:16")
    scheme.save("b.txt", sites)
    save_checkpoint(transform(model, scheme), "c.safetensors")
    capsys.readouterr()
    out = compare("digits.nmfx", "b.txt", "c.safetensors")
    assert "demo:digits: 3 schemes, 6 sites" in out
    assert re.search(r"^block1\.conv\.weight +2:16 +4:16 +4:16", out, re.MULTILINE)
    errors = [float(share) for share in re.findall(r"^[ABC] .* (\d+\.\d+)% +[-\d]+ *$", out, re.MULTILINE)]
    weight = {site.name: model.get_parameter(site.name).detach() for site in sites}
    energy = sum(float(w.square().sum()) for w in weight.values())
    baked = sum(float(w.square().sum()) for n, w in transform(model, scheme).state_dict().items() if n in weight)
    assert len(errors) == 3
    assert errors[1] == errors[2] < errors[0]
    assert baked == pytest.approx(energy)  # the masked model keeps its dense weights
    reached = sum(float((owner.weight).square().sum()) for owner in _owners(transform(model, scheme), sites))
    assert errors[1] == pytest.approx(100 * (1 - reached / energy), abs=1e-3)
    assert "unlike A" in compare("b.txt", "c.safetensors")
    assert "6 sites" in compare("b.txt", "b.txt", "--model", "digits.nmfx")
    assert "6 sites" in compare("b.txt", "b.txt", "--model", "demo:digits")


def _owners(model: torch.nn.Module, sites: Sites) -> list[torch.nn.Module]:
    return [model.get_submodule(site.owners[0][0]) for site in sites]


def test_figure_and_page(compare: Callable[..., str], fails: Callable[..., str], sites: Sites) -> None:
    write("a.yaml", Scheme.uniform(sites, "2:4"), sites)
    write("b.yaml", Scheme.uniform(sites, "1:4"), sites)
    assert "wrote c.svg, c.html" in compare("a.yaml", "b.yaml", "--figure", "c.svg", "--html", "c.html")
    assert "<svg" in Path("c.svg").read_text()
    assert "layer1.0.conv1.weight" in Path("c.html").read_text()
    assert "c.svg exists already" in fails("a.yaml", "b.yaml", "--figure", "c.svg")
    compare("a.yaml", "b.yaml", "--figure", "c.svg", "--force")


def test_errors(fails: Callable[..., str], sites: Sites) -> None:
    write("a.yaml", Scheme.uniform(sites, "2:4"), sites)
    with torch.device("meta"):
        other = find_sites(torchvision.models.resnet34(), torch.empty(1, 3, 224, 224))
    write("other.yaml", Scheme.uniform(other, "2:4"), other, "torchvision:resnet34")
    Scheme.uniform(other, "2:4").save("other.txt", other)
    Path("bad.yaml").write_text("nmfx: [")
    Path("empty.nmfx").mkdir()
    expected = "other.yaml: layer1.2.conv1.weight (64, 64, 3, 3): in the scheme, but no site of torchvision:resnet18"
    assert expected in fails("a.yaml", "other.yaml")
    assert "other.txt: has 'SparseConv5" in fails("a.yaml", "other.txt")
    assert "a.yaml: layer1.2.conv1.weight (64, 64, 3, 3): a site of the model" in fails(
        "a.yaml", "other.yaml", "--model", "resnet34"
    )
    assert "compare needs two schemes" in fails("a.yaml")
    assert "nothere.yaml: no such file" in fails("a.yaml", "nothere.yaml")
    assert "other.txt: does not say which network it is for; give --model" in fails("other.txt", "other.txt")
    assert "bad.yaml: not valid YAML" in fails("bad.yaml", "a.yaml")
    assert "bad.yaml: not valid YAML" in fails("a.yaml", "bad.yaml")
    assert "empty.nmfx: not a work directory" in fails("a.yaml", "empty.nmfx")
    assert "c.gif: a figure is written as" in fails("a.yaml", "a.yaml", "--figure", "c.gif")
    assert "c.txt: a page's name ends in .html" in fails("a.yaml", "a.yaml", "--html", "c.txt")


def test_a_work_directory_without_a_scheme(fails: Callable[..., str], sites: Sites, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(("convert", "demo:digits")) == 0
    capsys.readouterr()
    assert "digits.nmfx: has no scheme yet; make one with `nmfx search digits.nmfx`" in fails("digits.nmfx", "digits.nmfx")


@pytest.mark.parametrize("method", ["domino", "knapsack"])
def test_write_of_a_search(method: str) -> None:
    model = load_demo(trained=True)
    result = find_scheme(model, method=method, example_input=torch.empty(1, 1, 8, 8))
    report_io.check("a.png", "a.html", force=False)
    written = report_io.write(result, result.scheme, "a.png", "a.html", force=False)
    assert written == [Path("a.png"), Path("a.html")]
    page = Path("a.html").read_text()
    assert all(f"<td>{site.name}</td>" in page for site in result.sites)
    assert ("Which site stepped when" in page) == ("<summary>all" in page) == (method == "domino"), (
        "an exact solver has no steps"
    )
    assert ("Least loss at each budget" in page) == (method == "knapsack")
    assert (f"{len(result.events)} steps in" if method == "domino" else "decided at once, in") in page
    assert f"{result.totals.kept:,}" in page
    assert f"{result.left:,} left" in page
    assert report_io.write(result, result.scheme, None, None, force=False) == []
