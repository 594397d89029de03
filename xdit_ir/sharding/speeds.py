"""What kernels and links take, by size: the figures of a machine, as they are kept or measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

HALF = (torch.float16, torch.bfloat16)
# Values that joining two partial attentions reads and writes.
JOINED = 3


@dataclass(frozen=True)
class Kernels:
    """FLOP/s of large matrix products in half and single precision, and of attention by the kernel that PyTorch takes
    and by FlashAttention where installed; bytes/s at which products read and write, and at which what a compiler fuses
    does; seconds between two kernels.

    Smaller products are slower: `fill` elements of a result keep the GPU busy once, `depth` of the contracted size are
    lost at the begin of each. Heads of width `w`, made a multiple of `widths`, reach `w / (w + width)` of the speed
    of attention, which takes whole tiles of `tile` queries and keys.
    """

    products: float
    single: float
    attention: float
    flash: float
    memory: float
    fused: float
    gap: float = 0.0
    fill: float = 0.0
    depth: float = 0.0
    width: float = 0.0
    widths: int = 1
    tile: int = 1

    def __post_init__(self) -> None:
        _check(self, none=("gap", "fill", "depth", "width"))

    def product_seconds(self, flops: float, results: float, moved: float, dtype: torch.dtype) -> float:
        """Time of a matrix product with so many elements in its result that moves so many bytes."""
        if not flops:
            return 0.0
        contracted = flops / (2 * max(results, 1))
        speed = self.products if dtype in HALF else self.single
        busy = flops * (1 + self.fill / max(results, 1)) * (1 + self.depth / max(contracted, 1)) / speed
        return max(busy, moved / self.memory) + self.gap

    def attention_seconds(self, flops: float, width: int, dtype: torch.dtype, *, flash: bool = False) -> float:
        """Time of an attention with heads of this width."""
        if not flops:
            return 0.0
        speed = self.single if dtype not in HALF else self.flash if flash else self.attention
        whole = -(-max(width, 1) // self.widths) * self.widths
        return flops * whole / max(width, 1) * (1 + self.width / whole) / speed + self.gap

    def in_tiles(self, rows: int) -> float:
        """How many times so many queries or keys an attention computes."""
        return -(-rows // self.tile) * self.tile / rows if rows else 1.0

    def joining_seconds(self, result: float) -> float:
        """Time in which a hop of a ring begins attention anew and joins partial results: two are read and one is
        written, in twice the precision of the result, which has so many bytes."""
        return JOINED * self.gap + self.memory_seconds(2 * JOINED * result)

    def memory_seconds(self, moved: float) -> float:
        """Time in which an operator that only does that reads and writes so many bytes."""
        return moved / self.fused


@dataclass(frozen=True)
class Link:
    """What connects up to `ranks` GPUs: bytes/s that one of them sends, and seconds before the first byte arrives.
    `hidden`: copy engines move the data while the GPU computes; else kernels do, which take its place."""

    ranks: int
    bytes: float
    latency: float
    hidden: bool = True

    def __post_init__(self) -> None:
        _check(self, none=("latency", "hidden"))

    def seconds(self, sent: float) -> float:
        """Time of one exchange in which a rank sends so many bytes."""
        return self.latency + sent / self.bytes if sent else 0.0


def _check(figures: Kernels | Link, none: Sequence[str]) -> None:
    """Raise `ValueError` for a figure that is no positive number; those in `none` may be 0."""
    for name, value in vars(figures).items():
        known = isinstance(value, (int, float))
        if not known or not (value > 0 or (value == 0 and name in none)):
            raise ValueError(f"{name} = {value!r}: expected a positive number")


@dataclass(frozen=True)
class Links:
    """Those of a machine, from the fastest to the widest."""

    each: tuple[Link, ...]

    def between(self, ranks: Sequence[int]) -> Link:
        """What connects these ranks: the first link that reaches from the first of them to the last."""
        for link in self.each[:-1]:
            if min(ranks) // link.ranks == max(ranks) // link.ranks:
                return link
        return self.each[-1]

    def sending(self, rank: int, group: Sequence[int], sent: float) -> float:
        """Seconds in which `rank` sends so many bytes, as many to each other of a group, behind the first byte; each
        link takes what is for those that it reaches, all at the same time."""
        if not sent or len(group) < 2:
            return 0.0
        reached = Counter(self.between((rank, other)) for other in group if other != rank)
        return sent * max(count / link.bytes for link, count in reached.items()) / (len(group) - 1)
