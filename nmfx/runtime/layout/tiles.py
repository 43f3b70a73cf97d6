"""How the kernel cuts a product: the sizes that are tried, and what the ways to compute a site are called."""

from __future__ import annotations

from dataclasses import dataclass

SPARSE, LANES = "sparse", "lanes"  # words in the name of a way to compute a site


@dataclass(frozen=True)
class Tile:
    """How the kernel cuts a product of a sparse weight and pixels.

    Attributes:
        chunk: columns whose activations are read together, up to 65,536; with 4 * 16 * `vectors` bytes each they should fit
            into the first-level cache.
        vectors: of pixels that are computed together, 1 to 8.
        lanes: pictures are laid out as lanes, where a chain has them.
        zeros: all weights are stored, zeros too, and rows share what they read.
    """

    chunk: int = 64
    vectors: int = 8
    lanes: bool = False
    zeros: bool = False

    def __str__(self) -> str:
        """The name of this way to compute a site: ``sparse, lanes, with zeros 128x8``."""
        words = [SPARSE, *[LANES] * self.lanes, *["with zeros"] * self.zeros]
        return f"{', '.join(words)} {self.chunk}x{self.vectors}"


_PLAIN = ((64, 8), (96, 8), (128, 8), (256, 8), (128, 4), (192, 4), (256, 4), (512, 4))
_LANES = ((64, 8), (128, 8), (256, 8), (512, 8), (1024, 8), (128, 6), (256, 6), (512, 6), (256, 4), (512, 4))
_WITH_ZEROS = ((128, 8), (256, 4), (256, 3), (1024, 4))
TILES = tuple(  # to try, all of them
    Tile(*sizes, lanes=lanes, zeros=zeros)
    for lanes, plain in ((False, _PLAIN), (True, _LANES))
    for zeros, all_sizes in ((False, plain), (True, _WITH_ZEROS))
    for sizes in all_sizes
)

# Those that come within two percent of all (benchmarks/tuning.py), for sites that lanes can compute and for others.
_FEW_LANES = ((64, 8), (128, 8), (256, 6), (512, 6))
_FEW_WITH_ZEROS = ((128, 8), (256, 4))
FEW = {
    True: frozenset((
        *(Tile(*sizes, lanes=True) for sizes in _FEW_LANES),
        *(Tile(*sizes, lanes=True, zeros=True) for sizes in _FEW_WITH_ZEROS),
        Tile(128, 8),
    )),
    False: frozenset((
        *(Tile(*sizes) for sizes in ((64, 8), (128, 8), (256, 4), (512, 4))),
        *(Tile(*sizes, zeros=True) for sizes in _FEW_WITH_ZEROS),
    )),
}  # fmt: skip
