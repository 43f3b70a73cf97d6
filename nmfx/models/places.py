"""Where the entries of a tensor lie in the parameters they come from, and the rows that a product sums over there.

Whatever was done to a weight before the product (views, permutations, slices, flips, copies, joins), each entry of the operand
is one entry of a parameter, or none. The summed dimension, seen in the parameter's memory, gives the rows that groups are cut
from; if it cannot, the weight is no site.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nmfx.models.products import Operand


@dataclass(frozen=True)
class Held:
    """What a storage holds of parameters.

    Attributes:
        parameters: whose entries it holds, counted as if they were laid end to end.
        itemsize: bytes of an entry.
        order: for each entry of the storage, 1 + its place in the parameters, 0 for none; None: they are simply in order.
        altered: the operation that has put other values in the place of zeros; empty: where a parameter is zero, so is this.
        made: whether a product of parameters or with constants is in it: ``data`` if a layer (`F.linear`, a convolution)
            computed it, ``weight`` if it was multiplied out by hand.
        beside: parameters that are scaled into it in a way that loses their zeros, though not those of `parameters`.
        guessed: places were read by an index whose values are not known.
    """

    parameters: tuple[Tensor, ...]
    itemsize: int
    order: Tensor | None = None
    altered: str = ""
    made: str = ""
    beside: tuple[Tensor, ...] = ()
    guessed: bool = False

    @property
    def numel(self) -> int:
        """Entries of all parameters."""
        return sum(parameter.numel() for parameter in self.parameters)


def held_by(parameter: Tensor) -> Held:
    """What a parameter's own storage holds, however it lies there."""
    plain = parameter.is_contiguous() and parameter.storage_offset() == 0
    held = Held((parameter,), parameter.element_size())
    if plain and parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size():
        return held
    return lay(held, parameter, torch.arange(1, parameter.numel() + 1, device="cpu").view(parameter.shape))


def lay(held: Held, out: Tensor, places: Tensor) -> Held:
    """`held` in the storage of `out`, which has these `places` (of `out`'s shape)."""
    size = out.untyped_storage().nbytes() // out.element_size()
    plain = out.is_contiguous() and places.numel() == held.numel == size
    if plain and torch.equal(places.flatten(), torch.arange(1, held.numel + 1)):
        return replace(held, itemsize=out.element_size(), order=None)
    order = torch.zeros(size, dtype=torch.int64, device="cpu")
    order.as_strided(out.shape, out.stride(), out.storage_offset()).copy_(places)
    return replace(held, itemsize=out.element_size(), order=order)


def is_plain(held: Held, tensor: Tensor) -> bool:
    """Whether `tensor` is all of what is held, simply in order."""
    return held.order is None and tensor.is_contiguous() and tensor.numel() == held.numel


def places_in(held: Held, tensor: Tensor, shape: list[int] | None = None, stride: list[int] | None = None) -> Tensor | None:
    """1 + the place of every entry of `tensor`, a view of what is held; 0 for entries that are of no parameter.

    A complex view of real numbers gets a last dimension of two. None: the memory is read as numbers of another size.
    """
    shape, stride = list(shape or tensor.shape), list(stride or tensor.stride())
    offset, ratio = tensor.storage_offset(), tensor.element_size() / held.itemsize
    if tensor.is_complex() and ratio == 2:
        shape, stride, offset = [*shape, 2], [*(2 * s for s in stride), 1], 2 * offset
    elif ratio != 1:
        return None
    order = held.order if held.order is not None else torch.arange(1, held.numel + 1, device="cpu")
    return order.as_strided(shape, stride, offset)


def rebase(places: Tensor, held: Held, parameters: tuple[Tensor, ...]) -> Tensor:
    """`places` in the parameters of `held` as places in other `parameters`, which have those among them."""
    if [*map(id, parameters)] == [*map(id, held.parameters)]:
        return places
    result, start = torch.zeros_like(places), 0
    for parameter in held.parameters:
        before = sum(p.numel() for p in parameters[: next(i for i, p in enumerate(parameters) if p is parameter)])
        inside = (places > start) & (places <= start + parameter.numel())
        result, start = torch.where(inside, places - start + before, result), start + parameter.numel()
    return result


@dataclass(frozen=True)
class Part:
    """What one product reads of one parameter.

    Attributes:
        length: entries of a row; 0 when the summed entries do not lie in even steps.
        step: how far apart they lie.
        read: bool, true for what is read; None for all of it.
    """

    length: int
    step: int
    read: Tensor | None = None


def parts_of(held: Held, operand: Operand) -> dict[int, Part]:
    """What a product reads of each parameter, by the parameter's position in `held`."""
    if (part := _plain_part(held, operand)) is not None:
        return {0: part}
    shape, stride, dim = operand.view
    places = places_in(held, operand.tensor, shape, stride)
    if places is None:
        return {index: Part(0, 0) for index in range(len(held.parameters))}
    lines = places.movedim(dim, -1).reshape(-1, shape[dim]) - 1
    parts, start = {}, 0
    for index, parameter in enumerate(held.parameters):
        inside = (lines >= start) & (lines < start + parameter.numel())
        if bool(inside.any()):
            parts[index] = _part(lines - start, inside, parameter.numel(), guessed=held.guessed)
        start += parameter.numel()
    return parts


def _plain_part(held: Held, operand: Operand) -> Part | None:
    """`parts_of` without a map of every entry: for a view, of all of one parameter, whose strides nest."""
    shape, stride, dim = operand.view
    offset = operand.tensor.storage_offset()
    if held.order is not None or len(held.parameters) > 1 or operand.tensor.element_size() != held.itemsize:
        return None
    numel, length, step = held.numel, shape[dim], stride[dim]
    others = sorted((t, n) for i, (n, t) in enumerate(zip(shape, stride, strict=True)) if i != dim and n > 1 and t)
    if length == 1:
        step = math.prod(shape[dim + 1 :]) if operand.is_kernel else 1
    elif step == 0:
        return Part(0, 0)
    inner = sum((n - 1) * t for t, n in others if t < step) if length > 1 else 0
    dense = sorted([*others, *([(step, length)] if length > 1 else [])])
    nested = all(t == math.prod(n for _, n in dense[:i]) for i, (t, _) in enumerate(dense))
    if offset or math.prod(n for _, n in dense) != numel or not nested or inner >= step:
        return None
    return Part(length, step)


def _part(lines: Tensor, inside: Tensor, numel: int, *, guessed: bool) -> Part:
    """The part that `lines` (number, length) read of a parameter, where they are `inside` it."""
    read = torch.zeros(numel, dtype=torch.bool)
    read[lines[inside]] = True
    unread = None if guessed or bool(read.all()) else read
    rows = inside.any(dim=1)
    lines, inside = lines[rows], inside[rows]
    columns = inside.all(dim=0)
    if not torch.equal(columns, inside.any(dim=0)):
        return Part(0, 0, unread)
    lines = lines[:, columns]
    cuts = ((length, step) for length, step in _candidates(lines) if not numel % (length * step))
    return next((Part(*cut, unread) for cut in cuts if _is_cut(lines, *cut)), Part(0, 0, unread))


def _candidates(lines: Tensor) -> list[tuple[int, int]]:
    """Length and step of the rows that lines may consist of; a sum may run over two dimensions: the longer comes first."""
    length = lines.shape[1]
    if length == 1:
        return [(1, 1)]
    steps = lines.diff(dim=1)
    jumps = (steps != steps[:, :1]).any(dim=0).nonzero()
    run = int(jumps[0]) + 1 if len(jumps) else length
    if length % run:
        return []
    found = [(run, abs(int(steps[0, 0])), lines.unflatten(1, (-1, run)).amin(2))]
    if 1 < run < length:
        found.append((length // run, abs(int(lines[0, run] - lines[0, 0])), lines.unflatten(1, (-1, run)).amin(1)))
    # Where a run begins inside a row (a split of unequal pieces), rows of a common length begin with it.
    cuts = [(math.gcd(size, *(starts // step).unique().tolist()), step) for size, step, starts in found if size > 1 and step]
    return sorted((cut for cut in cuts if cut[0] > 1), reverse=True)


def _is_cut(lines: Tensor, length: int, step: int) -> bool:
    """Whether every line is made of whole rows of a parameter, each of them in order or in reverse."""
    count = lines.shape[1] // length
    row, position = lines // (length * step) * step + lines % step, lines // step % length
    for shape, axis in (((-1, count, length), 2), ((-1, length, count), 1)):
        rows, positions = row.view(shape).movedim(axis, -1), position.view(shape).movedim(axis, -1)
        forward = torch.arange(length)
        right = ((positions == forward) | (positions == forward.flip(0))).all()
        if bool((rows == rows[..., :1]).all()) and bool(right) and bool((positions[..., 1:] != positions[..., :-1]).all()):
            return True
    return False


def join_parts(parts: list[Part]) -> Part | None:
    """What several products read together; None when they sum over different dimensions."""
    read = None
    if all(part.read is not None for part in parts):
        read = torch.stack([part.read for part in parts if part.read is not None]).any(dim=0)
        read = None if bool(read.all()) else read
    if any(part.length == 0 for part in parts):
        return Part(0, 0, read)
    long = [part for part in parts if part.length != 1] or parts
    if len({part.step for part in long}) > 1:
        return None
    return Part(math.gcd(*(part.length for part in parts)), long[0].step, read)


def describe(read: Tensor, shape: tuple[int, ...]) -> str:
    """The entries that are read of a parameter, as a slice where they are one."""
    where = read.view(shape).nonzero()
    ends = [(int(low), int(high) + 1) for low, high in zip(where.amin(0), where.amax(0), strict=True)]
    if math.prod(high - low for low, high in ends) != len(where):
        return f"{len(where)} of {read.numel()} weights"
    texts = [
        ":" if (low, high) == (0, size) else f"{low or ''}:{high if high < size else ''}"
        for (low, high), size in zip(ends, shape, strict=True)
    ]
    while len(texts) > 1 and texts[-1] == ":":
        texts.pop()
    return f"[{', '.join(texts)}]"
