"""Windows that move along a dim (convolution, pooling, resizing): which runs of results and operand need each other."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass

from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.partition import Indices, Partition

Interval = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """How a dim of length `size` becomes one of length `out`: result i reads the `reach` elements from `start(i)` on.

    What lies outside of the operand is padding. Between neighbouring results a window moves by `stride / per`:
    `Window(size, out, stride, padding, reach)` is a convolution or a pooling, `Window(4, 8, per=2)` repeats every
    element twice, as resizing to the nearest does.

    >>> conv = Window(size=8, out=8, padding=1, reach=3)
    >>> conv.needed(Indices.range(0, 4)), conv.makes(Indices.range(0, 5))  # one row of halo
    (Indices(runs=((0, 5),)), Indices(runs=((0, 4),)))
    >>> conv.border(Indices.range(3, 8), Indices.range(4, 8))  # nothing in front, padding behind
    (0, 1)
    >>> Window(size=4, out=8, per=2).makes(Indices.range(2, 4))
    Indices(runs=((4, 4),))
    """

    size: int
    out: int
    stride: int = 1
    padding: int = 0
    reach: int = 1
    per: int = 1

    @property
    def tiles(self) -> bool:
        """Whether windows are adjacent blocks that cover everything."""
        tight = self.per == 1 and self.padding == 0
        return tight and self.reach == self.stride and self.reach * self.out == self.size

    def start(self, result: int) -> int:
        """The first element that a result reads."""
        return result * self.stride // self.per - self.padding

    def stop(self, result: int) -> int:
        """Behind the last element that a result reads."""
        return self.start(result) + self.reach

    def centre(self, result: int) -> int:
        """The element of whose neighbourhood a result tells; where windows move by several, their first in step."""
        return self.start(result) + ((self.reach - 1) // 2 if self.stride <= self.per else self.padding)

    def needed(self, part: Indices) -> Indices:
        """What a rank needs that makes one run of results, and the gap up to what the next one reads."""
        if not part.runs:
            return part
        first, stop = interval(part)
        end = self.size if stop == self.out else max(self.stop(stop - 1), self.start(stop))
        return Indices.range(max(self.start(first), 0), min(end, self.size))

    def makes(self, part: Indices) -> Indices:
        """All results that one run of the operand determines."""
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
        over = (self.reach - self.stride) // 2

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
        if self.tiles:
            made = partition.shorter(self.reach)
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
            return wanted.longer(self.reach)
        return None if any(len(part.runs) > 1 for part in wanted.parts) else wanted.map(self.size, self.needed)


def interval(part: Indices) -> Interval:
    """First and behind the last of one run."""
    ((start, length),) = part.runs
    return start, start + length
