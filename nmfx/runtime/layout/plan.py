"""Which pictures of a chain are laid out alike, and how: all of one size that convolutions of stride 1 and residuals connect.

A stride of two keeps rows in their lanes where they divide. Where they do not, the output is laid out anew, or the input is, as
one picture for each phase of the stride. For several threads pictures are cut into strips, one for each.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

from nmfx.runtime.layout.lanes import Lanes, Window

NARROWEST = 3  # vectors of a strip, at least
FILLED = 0.7  # share of the lanes that hold whole rows, or rows are cut where lanes end


@dataclass(frozen=True)
class Step:
    """An operator of a chain by lanes.

    Attributes:
        window: what it reads; None for means of planes, whose source is an operator by lanes.
        source: the node that is read.
        residual: the node that is added.
        by_channel: channels are computed by themselves, so that their halo can be made on the way.
    """

    window: Window | None
    source: Hashable
    residual: Hashable | None = None
    by_channel: bool = False


@dataclass(frozen=True)
class Copy:
    """A picture in memory: the output of `node` in the lanes of `kind`; or `phases` of it, for a stride of two."""

    node: Hashable
    kind: Hashable
    phases: tuple[tuple[int, int], ...] = ()


@dataclass
class Plan:
    """Which pictures the operators of a chain read and write, and how these lie in memory.

    Attributes:
        out, source, residual: by operator. What is written as `out` may not be what others read.
        down: rows of a lane from one that an operator reads to the next.
        lanes: by copy.
        edged: copies that a window reads beyond their pixels, where zeros must be.
        local: by operator by channel, a channel with the halo that is made on the way.
    """

    out: dict[Hashable, Copy] = field(default_factory=dict)
    source: dict[Hashable, Copy] = field(default_factory=dict)
    residual: dict[Hashable, Copy] = field(default_factory=dict)
    down: dict[Hashable, int] = field(default_factory=dict)
    lanes: dict[Copy, Lanes] = field(default_factory=dict)
    edged: set[Copy] = field(default_factory=set)
    local: dict[Hashable, Lanes] = field(default_factory=dict)

    def planes(self, node: Hashable) -> int:
        """Pictures that an operator reads for each channel."""
        return max(1, len(self.source[node].phases))

    def step(self, node: Hashable, window: Window) -> int:
        """Vectors from one that an operator reads to the next."""
        return 1 if self.source[node].phases else window.stride

    def late(self, node: Hashable, window: Window) -> list[int]:
        """For each strip, vectors by which its first window is late (see `Lanes.late`)."""
        out = self.lanes[self.out[node]]
        return [0] * out.strips if self.source[node].phases else self.lanes[self.source[node]].late(window.stride, out)

    def offsets(self, node: Hashable, window: Window) -> list[int]:
        """Offsets of the taps, in vectors from where a channel begins."""
        copy = self.source[node]
        lanes = self.local.get(node) or self.lanes[copy]
        phases = [copy.phases.index((row % 2, column % 2)) if copy.phases else 0 for row, column in window.taps]
        shifts = _shifts(lanes, window, phases=bool(copy.phases))
        return [phase * lanes.vectors + lanes.before + shift for phase, shift in zip(phases, shifts, strict=True)]


def lay_out(steps: Mapping[Hashable, Step], size: int, threads: int = 1) -> Plan:
    """Lanes for the operators of a chain.

    Args:
        steps: by node; sources and residuals that are no key are plain pictures, of which copies are made.
        size: lanes of a vector.
        threads: that share an operator; as many strips, where pictures divide.
    """
    kinds, pictures = _kinds(steps)
    rows = _rows(steps, kinds, pictures, size)
    strips = {kind: count if rows[kind] else 1 for kind, count in _strips(steps, kinds, pictures, threads).items()}
    plan, gaps = Plan(), dict.fromkeys(pictures, (0, 0))
    windows, in_place = defaultdict[Copy, list[tuple[Hashable, Window]]](list), set[Hashable]()
    sizes = {node: step.window.out for node, step in steps.items() if step.window is not None}
    for node, step in steps.items():
        if step.window is None:
            plan.source[node] = Copy(step.source, kinds[step.source])
            continue
        kind, window = kinds[node], step.window
        theirs = kinds.get(step.source, kind)
        plan.out[node], plan.source[node] = Copy(node, kind), Copy(step.source, theirs)
        plan.down[node] = window.stride
        if step.residual is not None:
            plan.residual[node] = Copy(step.residual, kind)
        alike = rows[kind] and rows[theirs] == 2 * rows[kind] and strips[theirs] == strips[kind]
        if window.stride == 2 and not (step.source in kinds and alike):
            if step.source in kinds and rows[theirs] and step.residual is None and len(window.taps) > 1:
                plan.out[node] = Copy(node, (node, "in place"))  # and laid out anew after that
                in_place.add(node)
            else:
                plan.source[node] = Copy(step.source, kind, window.phases)
                plan.down[node] = 1
        seen, phases = plan.source[node].kind, plan.source[node].phases
        if not step.by_channel or phases:
            windows[plan.source[node]].append((node, window))
        elif rows[seen]:
            continue  # which needs no gap in memory
        left, right = (_phased(window) if phases else window).gap(strips[seen])
        gaps[seen] = max(gaps[seen][0], left), max(gaps[seen][1], right)
    bare = {kind: Lanes.of(picture, gaps[kind], size, rows[kind], strips[kind]) for kind, picture in pictures.items()}
    for node in in_place:
        plan.down[node], bare[plan.out[node].kind] = Lanes.in_place(sizes[node], bare[plan.source[node].kind])
    for copy in {*plan.out.values(), *plan.source.values(), *plan.residual.values()}:
        lanes, seen_by = bare[copy.kind], list[tuple[list[int], int]]()
        for node, window in windows[copy]:
            last = lanes.last(plan.down[node], plan.step(node, window), bare[plan.out[node].kind])
            seen_by.append((_shifts(lanes, window, phases=bool(copy.phases)), last))
            if len(window.taps) > 1 or window.padding != (0, 0):
                plan.edged.add(copy)
        plan.lanes[copy] = lanes.seen_by(seen_by)
    for node, step in steps.items():
        if step.by_channel and step.window is not None and not plan.source[node].phases:
            lanes = bare[plan.source[node].kind]
            if lanes.whole_rows:
                lanes = Lanes.of(lanes.picture, step.window.gap(lanes.strips), size, lanes.rows, lanes.strips)
            last = lanes.last(plan.down[node], step.window.stride, bare[plan.out[node].kind])
            plan.local[node] = lanes.seen_by([(_shifts(lanes, step.window, phases=False), last)])
    return plan


def _strips(
    steps: Mapping[Hashable, Step],
    kinds: Mapping[Hashable, Hashable],
    pictures: Mapping[Hashable, tuple[int, int]],
    threads: int,
) -> dict[Hashable, int]:
    """Strips by kind: one a thread; a single one where pictures do not divide or are too narrow for what windows read."""
    widest = dict.fromkeys(pictures, NARROWEST)
    for node, step in steps.items():
        if step.window is not None:
            reach = max(abs(column) + 1 for _, column in step.window.taps)
            for kind in (kinds[node], kinds.get(step.source, kinds[node])):
                widest[kind] = max(widest[kind], reach)
    fits = {kind: width % threads == 0 and width >= widest[kind] * threads for kind, (_, width) in pictures.items()}
    return {kind: threads if fit else 1 for kind, fit in fits.items()}


def _kinds(steps: Mapping[Hashable, Step]) -> tuple[dict[Hashable, Hashable], dict[Hashable, tuple[int, int]]]:
    """The kind of every operator's output (an operator that stands for all), and the pictures' sizes by kind."""
    kinds: dict[Hashable, Hashable] = {}
    for node, step in steps.items():
        if step.window is None:
            continue
        kinds[node] = node
        joined = [step.source] if step.window.stride == 1 else []
        for other in [*joined, step.residual]:
            if other in kinds:
                old, new = kinds[other], kinds[node]
                kinds = {each: new if kind == old else kind for each, kind in kinds.items()}
    sizes = {node: step.window.out for node, step in steps.items() if step.window is not None}
    return kinds, {kind: sizes[kind] for kind in kinds.values()}


def _rows(
    steps: Mapping[Hashable, Step], kinds: Mapping[Hashable, Hashable], pictures: Mapping[Hashable, tuple[int, int]], size: int
) -> dict[Hashable, int]:
    """Whole rows in a lane, by kind (0: rows are cut): twice those after a stride of two, if that leaves few lanes empty."""
    found: dict[Hashable, int] = {}
    for kind in sorted(pictures, key=lambda one: pictures[one]):  # the smaller before the larger
        height = pictures[kind][0]
        ends = [
            2 * found[kinds[node]]
            for node, step in steps.items()
            if step.window is not None and step.window.stride == 2 and kinds.get(step.source) == kind
        ]
        fitting = [rows for rows in (*ends, -(-height // size)) if rows and height >= FILLED * rows * size]
        found[kind] = next((rows for rows in fitting if rows * size >= height), 0)
    return found


def _phased(window: Window) -> Window:
    """The window of stride 1 on each of the four phases that stands for one of stride 2: as wide as the furthest tap."""
    rows, columns = ([tap[axis] // 2 for tap in window.taps] for axis in (0, 1))
    return Window(
        *window.out, (max(rows) - min(rows) + 1, max(columns) - min(columns) + 1), 1, (-min(rows), -min(columns)), (1, 1)
    )


def _shifts(lanes: Lanes, window: Window, *, phases: bool) -> list[int]:
    """Offsets of the taps, in vectors from the pixel that a window is set on."""
    return [lanes.offset(row // 2, column // 2) if phases else lanes.offset(row, column) for row, column in window.taps]
