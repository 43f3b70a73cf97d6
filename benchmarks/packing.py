"""Pack and unpack in GB/s of dense weights, on one core: python benchmarks/packing.py"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from nmfx.sparsity.layout import Grouping
from nmfx.sparsity.mask import make_mask
from nmfx.sparsity.packing import pack, packed_sizes, unpack
from nmfx.sparsity.pattern import Pattern

SHAPES = ((2048, 2048, 1, 1), (512, 512, 3, 3))


def seconds(call: Callable[[], object]) -> float:
    """Median of five calls after one."""
    times = []
    for _ in range(6):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return median(times[1:])


def main() -> None:
    """Print one line for each shape and pattern."""
    torch.set_num_threads(1)
    for shape in SHAPES:
        weight = torch.randn(shape)
        for pattern in map(Pattern, ("2:4", "1:16", "2:16", "4:16", "8:16", "2:32")):
            grouping = Grouping((shape[0], shape[1], shape[2] * shape[3]), pattern.m)
            mask = make_mask(weight, pattern.n, grouping)
            values, positions = pack(weight, mask, pattern.n, grouping)
            size = weight.numel() * 4 / 1e9
            packing = size / seconds(lambda w=weight, k=mask, p=pattern, g=grouping: pack(w, k, p.n, g))
            parts = (values, positions, pattern.n, grouping, shape)
            unpacking = size / seconds(lambda parts=parts: unpack(*parts))
            bits = 8 * packed_sizes(pattern.n, grouping)[1] / grouping.groups
            print(
                f"{shape!s:<20} {pattern!s:>5}: pack {packing:.2f} GB/s, unpack {unpacking:.2f} GB/s, {bits:.1f} bits a group"
            )


if __name__ == "__main__":
    main()
