"""Windows that move along a dim (convolution, pooling, resizing): which runs of results and operand need each other."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from fractions import Fraction

from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.partition import Indices, Partition

Interval = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """How a dim of length `size` becomes one of length `out`: result i reads the elements from
    `(i * stride + low) // per` to `(i * stride + high) // per`; what lies outside of the operand is padding.

    Between neighbouring results a window moves by `stride / per`. Kernels that know sizes only, and not where in a
    dim they are, work on runs of the operand that begin and end at multiples of `unit`, or at its ends. `shift`: where
    it is known, result i tells of the element `(i * stride + shift) // per`, such as behind what was added in front.

    >>> conv = Window.sliding(size=8, out=8, padding=1, reach=3)
    >>> conv.needed(Indices.range(0, 4)), conv.makes(Indices.range(0, 5))  # one row of halo
    (Indices(runs=((0, 5),)), Indices(runs=((0, 4),)))
    >>> conv.border(Indices.range(3, 8), Indices.range(4, 8))  # nothing in front, padding behind
    (0, 1)
    >>> Window.resized(size=4, out=8).makes(Indices.range(2, 4))  # every element twice
    Indices(runs=((4, 4),))
    >>> Window.transposed(size=4, out=8, stride=2, padding=1, reach=4).needed(Indices.range(0, 4))
    Indices(runs=((0, 3),))
    """

    size: int
    out: int
    stride: int = 1
    low: int = 0
    high: int = 0
    per: int = 1
    unit: int = 1
    shift: int | None = None

    @staticmethod
    def sliding(size: int, out: int, stride: int = 1, padding: int = 0, reach: int = 1) -> Window:
        """Convolutions and poolings: `reach` elements from `i * stride - padding` on."""
        return Window(size, out, stride, -padding, reach - 1 - padding)

    @staticmethod
    def transposed(size: int, out: int, stride: int, padding: int, reach: int) -> Window:
        """Convolutions of which element j adds to the `reach` results from `j * stride - padding` on; those that no
        element adds to belong to the one before."""
        return Window(size, out, 1, padding - max(reach, stride) + stride, padding, stride)

    @staticmethod
    def resized(size: int, out: int) -> Window:
        """Resizing to the nearest: the element at `i * size / out`."""
        shared = math.gcd(size, out)
        return Window(size, out, size // shared, 0, 0, out // shared, size // shared)

    @staticmethod
    def tapped(size: int, out: int, before: int, after: int) -> Window:
        """Resizing that reads from `before` in front of the element at `(i + 1/2) * size / out - 1/2` to `after` behind
        it."""
        shared = math.gcd(size, out)
        step, per = size // shared, out // shared
        return Window(size, out, 2 * step, step - per - before * 2 * per, step - per + after * 2 * per, 2 * per, step)

    @staticmethod
    def around(size: int, out: int, reach: int) -> Window:
        """Resizing that weighs what is less than `reach` times the larger of both spacings from the centre of a
        result, at `(i + 1/2) * size / out`."""
        shared = math.gcd(size, out)
        step, per = size // shared, out // shared
        low, high = step + per - 2 * reach * max(step, per), step - per + 2 * reach * max(step, per)
        return Window(size, out, 2 * step, low, high, 2 * per, step)

    @staticmethod
    def placed(size: int, out: int, step: Fraction, at: Fraction, before: int, after: int) -> Window:
        """Any other resizing: from `before` in front of the element at `i * step + at` to `after` behind it."""
        per = math.lcm(step.denominator, at.denominator)
        begin = int(at * per)
        return Window(size, out, int(step * per), begin - before * per, begin + after * per, per)

    @staticmethod
    def adaptive(size: int, out: int) -> Window:
        """Adaptive pooling: all elements of which a part lies between `i * size / out` and `(i + 1) * size / out`."""
        return Window(size, out, size, 0, size - 1, out)

    @property
    def tiles(self) -> bool:
        """Whether windows are adjacent blocks that cover everything."""
        tight = self.per == 1 and self.low == 0 and self.high == self.stride - 1
        return tight and self.stride * self.out == self.size

    @property
    def repeats(self) -> bool:
        """Whether every element makes `per` results, alone."""
        alone = self.stride == 1 and self.low == self.high == 0
        return alone and self.per * self.size == self.out

    def start(self, result: int) -> int:
        """The first element that a result reads."""
        return (result * self.stride + self.low) // self.per

    def stop(self, result: int) -> int:
        """Behind the last element that a result reads."""
        return (result * self.stride + self.high) // self.per + 1

    def centre(self, result: int) -> int:
        """The element of whose neighbourhood a result tells; where windows move by several, their first in step."""
        if self.shift is not None:
            return (result * self.stride + self.shift) // self.per
        if self.stride > self.per:
            return result * self.stride // self.per
        return (2 * result * self.stride + self.low + self.high) // (2 * self.per)

    def needed(self, part: Indices) -> Indices:
        """What a rank needs that makes one run of results, and the gap up to what the next one reads."""
        if not part.runs:
            return part
        first, stop = interval(part)
        end = self.size if stop == self.out else max(self.stop(stop - 1), self.start(stop))
        end = -(-end // self.unit) * self.unit
        return Indices.range(max(self.start(first), 0) // self.unit * self.unit, min(end, self.size))

    def usable(self, part: Indices) -> Indices:
        """What of one run of the operand begins and ends where it may."""
        if not part.runs:
            return part
        start, end = interval(part)
        return Indices.range(
            -(-start // self.unit) * self.unit, end if end == self.size else end // self.unit * self.unit
        )

    def makes(self, part: Indices) -> Indices:
        """All results that one run of the operand determines."""
        part = self.usable(part)
        if not part.runs:
            return part
        (start, end), every = interval(part), range(self.out)
        first = 0 if start == 0 else bisect_left(every, start, key=self.start)
        return Indices.range(first, self.out if end == self.size else bisect_right(every, end, key=self.stop))

    def centred(self, part: Indices) -> Indices:
        """The results whose window has its centre in one run of the operand."""
        if not part.runs:
            return part
        start, end = interval(part)
        first, stop = (bisect_left(range(self.out), edge, key=self.centre) for edge in (start, end))
        return Indices.range(0 if start == 0 else first, self.out if end == self.size else stop)

    def of(self, mesh: Mesh, partition: Partition) -> Partition | None:
        """The results that ranks make: all that their parts determine, or, where that leaves some out, those of which
        the window, less what reaches over into its neighbours', begins in their parts. None: it must be whole."""
        if any(len(part.runs) > 1 for part in partition.parts):
            return None
        over = (self.high - self.low + self.per - self.stride) // (2 * self.per)

        def begun(part: Indices) -> Indices:
            if not part.runs:
                return part
            start, end = interval(part)
            first, stop = (bisect_left(range(self.out), edge - over, key=self.start) for edge in (start, end))
            return Indices.range(0 if start == 0 else first, self.out if end == self.size else stop)

        groups = {mesh.group(rank, mesh.dividing_dims(partition)) for rank in range(mesh.world_size)}
        tried = (partition.map(self.out, makes) for makes in (self.makes, begun))
        return next((made for made in tried if all(made.covers(group) for group in groups)), None)

    def border(self, held: Indices, made: Indices) -> Interval:
        """Padding to add before and after what a rank holds (negative: elements to drop) to make these results."""
        (start, end), (first, stop) = interval(held), interval(made)
        return start - self.start(first), self.stop(stop - 1) - end

    def divide(self, mesh: Mesh, partition: Partition) -> tuple[Partition, Partition] | None:
        """What ranks need of the operand and what they make: without talking if possible; None: it must be whole."""
        made = partition.longer(self.per) if self.repeats else partition.shorter(self.stride) if self.tiles else None
        if made is not None:
            return partition, made
        if any(len(part.runs) > 1 for part in partition.parts):
            return None
        groups = {mesh.group(rank, mesh.dividing_dims(partition)) for rank in range(mesh.world_size)}
        made = partition.map(self.out, self.makes)
        if all(made.covers(group) for group in groups):
            return partition, made
        needs = partition.map(self.out, self.centred).map(self.size, self.needed)
        made = needs.map(self.out, self.makes)  # at the border a halo is enough for more than was asked for
        spared = not any(part.is_whole(self.size) for part in needs.parts)
        return (needs, made) if spared and all(made.covers(group) for group in groups) else None

    def demand(self, wanted: Partition) -> Partition | None:
        """The operand's partition from which ranks make these results without talking; None: there is none."""
        if self.tiles:
            return wanted.longer(self.stride)
        if self.repeats:
            return wanted.shorter(self.per)
        return None if any(len(part.runs) > 1 for part in wanted.parts) else wanted.map(self.size, self.needed)


def interval(part: Indices) -> Interval:
    """First and behind the last of one run."""
    ((start, length),) = part.runs
    return start, start + length
