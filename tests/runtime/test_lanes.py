"""Pictures as lanes: how they are laid out, and networks that work on them."""

from __future__ import annotations

import pytest
import torch
from networks import lanes_case
from torch import Tensor, fx, nn

import nmfx
from nmfx.runtime.calls import steps_by_lanes
from nmfx.runtime.chain import link
from nmfx.runtime.kernel.library import load_kernel
from nmfx.runtime.layers import sparse_layer
from nmfx.runtime.layout.lanes import NO_PIXEL, Lanes, Window, between, from_plain, sources, to_plain
from nmfx.runtime.layout.packed import pack_for_lanes
from nmfx.runtime.layout.plan import Step, lay_out
from nmfx.runtime.layout.tiles import Tile
from nmfx.runtime.lowering.exporting import export
from nmfx.runtime.lowering.fusion import lower

SHAPES = [(56, 56), (28, 28), (14, 14), (7, 7), (9, 30), (17, 6), (1, 5), (1, 1)]


@pytest.fixture(scope="module", autouse=True)
def kernel() -> None:
    """These tests are of the kernel: a machine of ours without a compiler fails them."""
    assert load_kernel() == ""


@pytest.mark.parametrize("seed", range(24))
def test_networks_follow_float64_on_any_number_of_threads(seed: int) -> None:
    assert lanes_case(seed) > 0


def layouts(picture: tuple[int, int], size: int) -> list[Lanes]:
    """With zeros rows and without, in one strip and in two, bare and with a halo."""
    height, width = picture
    found = []
    for gap in ((0, 0), (1, 1), (2, 1)):
        found.append(Lanes.of(picture, gap, size, 0, 1))
        for strips in (1, 2):
            if width % strips == 0:
                found.append(Lanes.of(picture, gap, size, -(-height // size), strips))
    halo = [([-3, 0, 2], each.length - 1) for each in found]
    return [each.seen_by([]) for each in found] + [each.seen_by([one]) for each, one in zip(found, halo, strict=True)]


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize("picture", SHAPES, ids=str)
def test_every_pixel_has_one_place_and_comes_back(picture: tuple[int, int], size: int) -> None:
    pixels = picture[0] * picture[1]
    for lanes in layouts(picture, size):
        row, column = lanes.places()[:, :, lanes.before : lanes.before + lanes.length]
        if lanes.strips == 1:
            held = (row * picture[1] + column)[row >= 0]
            assert sorted(held.tolist()) == list(range(pixels))
        there = from_plain(lanes)  # (strips, floats): where each float is in the plane
        back = to_plain(lanes)[0].long()
        strip, place = back.div(1 << 22, rounding_mode="floor"), back.remainder(1 << 22)
        assert torch.equal(there[strip, place], torch.arange(pixels, dtype=torch.int32))
        assert torch.equal(between(lanes, to_plain(lanes)[:, :0]), to_plain(lanes)[:, :0])


def test_what_is_beyond_the_picture_is_zero() -> None:
    lanes = Lanes.of((3, 4), (1, 1), 4, 1, 1).seen_by([([-6, 6], 3)])  # a lane a row of 4 + 1
    row, column = lanes.places()[:, 0]
    assert (lanes.length, lanes.before, lanes.vectors) == (5, 6, 17)
    assert row[6].tolist() == [0, 1, 2, -1]  # the first pixels of all rows
    assert column[6 + 4].tolist() == [-1] * 4  # the gap
    assert row[1].tolist() == [-1, 0, 1, 2]  # the row above each
    assert lanes.mask().flatten().tolist() == [-1, -1, -1, 0]


@pytest.mark.parametrize(("strips", "rows"), [(1, 1), (2, 1), (2, 2), (1, 0)])
def test_a_halo_made_on_the_way_is_the_one_in_memory(strips: int, rows: int) -> None:
    bare = Lanes.of((14, 12) if rows else (7, 7), (2, 2) if not rows else (0, 0), 8 if rows == 2 else 16, rows, strips).seen_by(
        []
    )
    full = (Lanes.of(bare.picture, (2, 2), bare.size, rows, strips) if rows else bare).seen_by([([-5, 5], bare.length - 1)])
    plain, mask = from_plain(bare).reshape(strips, bare.vectors, bare.size), bare.mask().flatten()
    wanted = from_plain(full).reshape(strips, full.vectors, full.size)
    for strip in range(strips):
        for vector, (beside, there, lanes, held) in enumerate(sources(full, bare)[strip].tolist()):
            found = torch.full((full.size,), -1, dtype=torch.int32)
            if lanes != NO_PIXEL:
                masked = torch.where(mask[held : held + full.size] < 0, plain[strip + beside, bare.before + there], -1)
                for lane in range(full.size):
                    if 0 <= lane + lanes < full.size:
                        found[lane] = masked[lane + lanes]
            assert torch.equal(found, wanted[strip, vector]), (strip, vector)


def test_strides_keep_rows_in_their_lanes() -> None:
    def window(size: int, kernel: int, stride: int) -> Window:
        out = -(-size // stride)
        found = Window.of((size, size), (out, out), (kernel, kernel), (stride, stride), (kernel // 2, kernel // 2), (1, 1))
        assert found is not None
        return found

    steps = {
        "a": Step(window(56, 3, 1), "x"),
        "b": Step(window(56, 3, 2), "a"),
        "c": Step(window(28, 3, 2), "b"),
        "d": Step(window(14, 3, 2), "c"),
        "e": Step(window(7, 1, 1), "d"),
    }
    plan = lay_out(steps, 16)
    assert [plan.lanes[plan.out[node]].rows for node in "abc"] == [4, 2, 1]
    assert plan.out["d"] != plan.source["e"]  # laid out anew: 7 rows would leave half of the lanes empty
    assert plan.lanes[plan.source["e"]].length == 4
    assert [plan.down[node] for node in "abcde"] == [1, 2, 2, 1, 1]
    assert {plan.lanes[plan.out[node]].strips for node in "abc"} == {1}
    strips = lay_out(steps, 16, threads=2)
    assert [strips.lanes[strips.out[node]].strips for node in "abcde"] == [2, 2, 2, 2, 1]
    assert Window.of((8, 8), (6, 6), (3, 3), (1, 1), (0, 0), (1, 1)) is None  # smaller by its borders
    assert Window.of((9, 9), (3, 3), (3, 3), (3, 3), (0, 0), (1, 1)) is None


def test_windows_wider_than_a_strip_leave_the_picture_whole() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 4, (1, 7), padding=(0, 6), dilation=(1, 2)), nn.Conv2d(4, 4, 1))
    x, before, found = torch.randn(1, 4, 16, 8), torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        graph = named(net, x)[0]
        link(graph)
        with torch.no_grad():
            found.append(graph(x))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], net(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "stride"),
    [((3, 4, 1, 1), (4, 1, 4, 4)), ((3, 4, 1, 6), (24, 6, 1, 1)), ((1, 4, 6, 1), (9, 6, 1, 7))],
    ids=["one pixel, channels last", "one row", "one column of one picture"],
)
def test_strides_that_nothing_steps_along_do_not_matter(shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
    """As the average of channels-last pictures has them."""
    net = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 1))
    x = torch.randn(shape)
    odd = torch.empty(shape).as_strided(shape, stride).copy_(x)
    assert odd.is_contiguous()
    graph, laid = named(net, x)
    link(graph)
    assert laid
    with torch.no_grad():
        assert torch.equal(graph(odd), graph(x))
        torch.testing.assert_close(graph(x), net(x), rtol=1e-4, atol=1e-5)


def named(model: nn.Module, x: Tensor) -> tuple[fx.GraphModule, set[str]]:
    """The lowered graph with all sites by lanes, and which would be."""
    graph, _ = export(model.eval(), x)
    sites = lower(graph)
    for node, fused in sites:
        graph.add_submodule(str(node.target), sparse_layer(fused, Tile(lanes=True)))
    return graph, {str(node.target) for node in steps_by_lanes(graph)}


def test_lanes_are_for_neighbours_and_poolings_without_negative_pixels() -> None:
    x = torch.randn(1, 4, 16, 16)
    pool = "nmfx.max_pool2d.default"
    conv = lambda: nn.Conv2d(4, 4, 3, padding=1)  # noqa: E731
    assert named(nn.Sequential(conv(), nn.GELU(), conv()), x)[1] == set()  # each alone between plain operators
    assert named(nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(3, 2, 1), conv()), x)[1] == {"site0", pool, "site1"}
    assert named(nn.Sequential(conv(), nn.MaxPool2d(3, 2, 1), conv()), x)[1] == set()  # whose zeros would be pixels
    assert named(nn.Sequential(conv(), conv(), nn.MaxPool2d(3, 2, 1)), x)[1] == {"site0", "site1"}


def test_columns_count_vectors_from_where_their_chunk_starts() -> None:
    make = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 4, 1, 3, generator=make) * (torch.rand(6, 4, 1, 3, generator=make) < 0.4)
    packed, starts = pack_for_lanes(weight, 2, [4, 5, 6], 100, chunk=6, zeros=False)
    assert packed.chunk == 6
    dense, chunks, rows = torch.zeros(6, 8 * 100), 2, 3
    lines = torch.repeat_interleave(torch.arange(12), (packed.pointers[1:] - packed.pointers[:-1]).long())
    for line, value, column in zip(lines.tolist(), packed.values, packed.columns.tolist(), strict=True):
        group, chunk, row = line // (chunks * rows), line // rows % chunks, line % rows
        dense[group * rows + row, starts[group * chunks + chunk] + column] = value
    for group in range(2):
        for channel in range(4):
            taps = dense[group * 3 : group * 3 + 3, (group * 4 + channel) * 100 + 4 :][:, :3]
            assert torch.equal(taps, weight[group * 3 : group * 3 + 3, channel, 0])
    assert int(dense.count_nonzero()) == int(weight.count_nonzero())


def test_compile_takes_lanes_where_they_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """And gives the same: every choice is made for lanes, whatever the clock says."""
    from nmfx.runtime import compiler
    from nmfx.runtime.measuring import choices

    monkeypatch.setattr(choices, "BEFORE_OTHERS", 1e9)
    monkeypatch.setattr(compiler, "NETWORK_SECONDS", 0.0)
    monkeypatch.setattr("nmfx.runtime.measuring.timing.ROUNDS", 1)
    monkeypatch.setattr("nmfx.runtime.measuring.timing.TURN_SECONDS", 0.0)
    monkeypatch.setattr(compiler, "measure", lambda runs, **_: {name: -float(name) for name in runs})  # the last: with lanes
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 1), nn.Conv2d(32, 32, 3, 1, 1, groups=32)
    ).eval()
    x = torch.randn(2, 3, 32, 32)
    found = nmfx.compile(model, x, batch=2)
    assert [choice.chosen.split(" ")[1].strip(",") for choice in found.choices] == ["lanes", "lanes", "depthwise"]
    with torch.no_grad():
        torch.testing.assert_close(found(x), model(x), rtol=1e-4, atol=1e-5)
