"""The steps of a program that compute in bytes: pictures as planes, int8 weights in blocks (kernel/planes.h, quantized.h)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from nmfx.runtime.layout.blocks import row_sums
from nmfx.runtime.layout.lanes import Window
from nmfx.runtime.layout.planes import Picture, Planes, lay_out, offsets, read_by, whole_lines
from nmfx.runtime.operators import OPERATORS, bits_of

if TYPE_CHECKING:
    from nmfx.runtime.calls import Call
    from nmfx.runtime.program import Program

WINDOWED = ("int8_conv2d", "int8_max_pool2d")


def window_over(node: fx.Node, named: dict[str, Any]) -> Window | None:
    """The window of an int8 operator, if planes can compute it, else None."""
    source: Any = node.args[0]
    shapes = [tuple(each.meta["val"].shape[2:]) for each in (source, node)]
    rest = (named["kernel"], named["stride"], named["padding"], named.get("dilation", (1, 1)))
    return Window.of(shapes[0], shapes[1], *map(tuple, rest))  # type: ignore[arg-type]


class PlanesWriter:
    """Writes the steps of the int8 operators of a program.

    Args:
        program: that they are added to.
        calls: the int8 operators, by node.
    """

    def __init__(self, program: Program, calls: dict[fx.Node, Call]) -> None:
        self.program, self.calls = program, calls
        self.windows: dict[fx.Node, Window] = {}
        self.slots: dict[Picture, int] = {}
        self.known: dict[Any, Any] = {}  # constants that several steps name
        shapes: dict[Picture, tuple[int, int]] = {}
        zeros: dict[Any, int] = {}
        windows = defaultdict[Picture, list[Window]](list)
        for node, call in calls.items():
            named, source = call.named, call.named["input"]
            if call.operator.name == "int8_linear":
                continue
            if call.operator.name == "quantize":
                zeros[node] = named["zero"]
                continue
            zeros.setdefault(source, named.get("zero", 0))
            read = Picture(source)
            if call.operator.name in WINDOWED:
                window = window_over(node, named)
                if window is None:
                    raise RuntimeError(f"nmfx runtime: expected a window that planes can compute, at {node.name}")
                self.windows[node] = window
                read = read_by(window, source)
                windows[read].append(window)
                zeros[node] = named.get("zero_out", 0)
                shapes[Picture(node)] = window.out
                if isinstance(added := named.get("residual"), fx.Node):
                    zeros.setdefault(added, 0)
                    shapes[Picture(added)] = window.out
            shapes[read] = self.windows[node].out if read.phases else tuple(source.meta["val"].shape[2:])
        self.planes = lay_out(shapes, windows, zeros)
        self.seen = {picture for picture in windows if self.planes[picture].margin}

    def write(self, node: fx.Node) -> None:
        """Add the step of an int8 operator; pictures are quantised where they are read."""
        call, program = self.calls[node], self.program
        named, operator = call.named, OPERATORS[call.operator.planes]
        if call.operator.name == "quantize":
            return
        if call.operator.name == "int8_linear":
            slot = program._plain(named["input"])
            limits = [bits_of(named["low"]), bits_of(named["high"])]
            sizes = [named["out_features"], named["width"], named["height"]]
            numbers = [slot, *self._weight(named), *sizes, bits_of(named["inverse"]), named["zero"], *limits]
            program.plain[node] = program._append([operator.code, *numbers], [slot], leaves=node in program.leaving)
            return
        source = named["input"]
        read = read_by(self.windows[node], source) if node in self.windows else Picture(source)
        slot, planes = self._slot(read), self.planes[read]
        numbers = [operator.code, slot, *planes.numbers]
        if node not in self.windows:
            numbers.append(bits_of(named["scale"]))
            if call.operator.name == "dequantize":
                numbers.append(0)
            program.plain[node] = program._append(numbers, [slot], leaves=node in program.leaving)
            return
        out, reads = Picture(node), [slot]
        channels = source.meta["val"].shape[1]
        mask = self._constant(("mask", self.planes[out]), self.planes[out].mask) if out in self.seen else -1
        if call.operator.name == "int8_max_pool2d":
            taps = self._constant(("taps", self.windows[node], planes), lambda: offsets(self.windows[node], planes, 1))
            numbers += [taps, max(1, len(read.phases)), *self.planes[out].numbers, mask]
        else:
            window = self.windows[node]
            reach = self._constant(("offsets", window, planes, channels), lambda: offsets(window, planes, channels))
            weight = self._weight(named)
            added: list[int] = [0]
            if isinstance(named["residual"], fx.Node):
                other = Picture(named["residual"])
                reads.append(self._slot(other))
                added = [1, reads[1], *self.planes[other].numbers, bits_of(named["residual_scale"])]
            rows = [named["out_channels"], named["height"]]
            numbers += [*weight[:3], reach, *weight[3:], *rows, *self.planes[out].numbers, mask]
            numbers += [named["low"], named["high"], *added]
        self.slots[out] = program._append(numbers, reads)

    def plain(self, node: fx.Node) -> int | None:
        """The slot of a picture of bytes, as it leaves the chain; None if it is none of these."""
        if Picture(node) not in self.slots and self.calls.get(node) is None:
            return None
        if Picture(node) not in self.planes:  # quantised for others than this chain
            shape, named = node.meta["val"].shape, self.calls[node].named
            length = whole_lines(shape[2] * shape[3])
            self.planes[Picture(node)] = Planes(shape[2], shape[3], shape[3], length, 0, named["zero"])
        slot = self._slot(Picture(node))
        numbers = [OPERATORS["plain_of_planes"].code, slot, *self.planes[Picture(node)].numbers, bits_of(1.0), 1]
        return self.program._append(numbers, [slot], leaves=True)

    def _slot(self, picture: Picture) -> int:
        """The slot of a picture; a step that makes it is added if there is none."""
        if picture not in self.slots:
            node: Any = picture.node
            how = [*self.planes[picture].numbers, picture.stride, len(picture.numbers), *picture.numbers]
            if Picture(node) in self.slots:
                own = self.slots[Picture(node)]
                step = [OPERATORS["planes_again"].code, own, *self.planes[Picture(node)].numbers, *how]
            else:
                call = self.calls.get(node)
                own = self.program._plain(node if call is None else call.named["input"])
                step = [OPERATORS["planes_of"].code, own, bits_of(1.0 if call is None else call.named["inverse"]), *how]
            self.slots[picture] = self.program._append(step, [own])
        return self.slots[picture]

    def _weight(self, named: dict[str, Any]) -> list[int]:
        """Values, columns, blocks, scales, shifts and sums of the rows of a weight, once for all steps that use it."""

        def make() -> list[int]:
            tensors = [named[name] for name in ("values", "columns", "blocks", "scales", "shifts")]
            sums = row_sums(named["values"], named["blocks"], named["height"])
            return [self.program._constant(one) for one in (*tensors, sums)]

        return self._shared(tuple(id(named[name]) for name in ("values", "scales", "shifts")), make)  # type: ignore[no-any-return]

    def _shared(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self.known:
            self.known[key] = make()
        return self.known[key]

    def _constant(self, key: Any, make: Callable[[], Tensor]) -> int:
        return self._shared(key, lambda: self.program._constant(make()))  # type: ignore[no-any-return]
