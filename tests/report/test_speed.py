"""The figure of a bench: one bar an engine and group, named, with its speed."""

from __future__ import annotations

from itertools import product

from nmfx.report.measured import draw_speed
from nmfx.report.record import Speed


def test_every_engine_has_a_bar_and_its_number() -> None:
    engines, groups = ("PyTorch", "ONNX Runtime", "nmfx"), ("batch 1, 1 thread", "batch 8, 2 threads")
    speeds = [Speed(e, g, 0.5 + i / 3, 0.4 + i / 3, 0.6 + i / 3) for i, (g, e) in enumerate(product(groups, engines))]
    axes = draw_speed(speeds[:-2] + speeds[-1:], title="a network").axes[0]  # one engine is missing in the second group
    assert [label.get_text() for label in axes.get_yticklabels()] == [*engines, "PyTorch", "nmfx"]
    shown = [text.get_text() for text in axes.texts]
    assert [text for text in shown if text.startswith("batch")] == list(groups)
    assert [text for text in shown if text.endswith("x")] == [f"{s.median:.2f}x" for s in speeds[:-2] + speeds[-1:]]
    widths = [bar.get_width() for bar in axes.patches if bar.get_width()]
    assert widths == [s.median for s in speeds[:-2] + speeds[-1:]]
