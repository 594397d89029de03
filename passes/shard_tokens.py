"""`shard-tokens`: divide the token streams over the mesh dims `ring` and `ulysses`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from xdit_ir.cost import moved_bytes, program_flops
from xdit_ir.errors import ParallelizeError
from xdit_ir.layout import Layout
from xdit_ir.mesh import Mesh
from xdit_ir.program import LAYOUT, SPEC, Program, TokenAxis
from xdit_ir.propagate import Layouts, Propagation, Seeds

SEQUENCE = ("ring", "ulysses")


@dataclass(frozen=True, order=True)
class Price:
    """What a partition costs: work of the slowest rank (in 1/10000 of one device), then bytes between ranks."""

    work: int
    bytes: int


@dataclass(frozen=True)
class _Choice:
    price: Price
    program: Program
    seeds: Seeds


@dataclass(frozen=True)
class ShardTokens:
    """Propose partitions of the best token stream, propagate each, keep the cheapest, add further streams greedily.

    Proposals: contiguous and even; even within the segments into which the model cuts the stream; in whole units of
    a view's inner factor (rows, frames); even within each such unit (places of every frame). Numerics: exact.
    """

    mesh: Mesh
    name: str = "shard-tokens"

    def apply(self, program: Program) -> Program:
        """The program with its token streams divided."""
        degree = self.mesh.size(SEQUENCE)
        if degree == 1:
            return program
        trial = Propagation(program, self.mesh)
        best: _Choice | None = None
        for axis in program.tokens:
            if axis.gathered and best is None:
                break
            if best is not None and _layout(best.program, axis).dims[axis.dim] is not None:
                continue
            for layouts in self._proposals(program, axis):
                seeds = {**(best.seeds if best else {}), axis.value: layouts}
                choice = self._priced(trial.run(seeds), seeds)
                if best is None or choice.price < best.price:
                    best = choice
        if best is None:
            raise ParallelizeError(
                f"ulysses x ring = {degree} divides the tokens, but no attention of this model takes its queries "
                "from a token stream that could be divided; use ulysses=1, ring=1"
            )
        return best.program.replace(mesh=self.mesh)

    def _priced(self, program: Program, seeds: Seeds) -> _Choice:
        slowest, total = max(program_flops(program, self.mesh)), max(program_flops(program, None)[0], 1)
        return _Choice(Price(round(10_000 * slowest / total), moved_bytes(program, self.mesh)), program, seeds)

    def _proposals(self, program: Program, axis: TokenAxis) -> Iterator[Layouts]:
        have = _layout(program, axis)
        if have.dims[axis.dim] is not None:
            return
        seen = set()
        inside = [(1, (unit,) * (axis.size // unit)) for unit in axis.units]
        for unit, segments in [*itertools.product((1, *axis.units), ((), *axis.segments)), *inside]:
            partition = self.mesh.divide(axis.size, SEQUENCE, unit, segments)
            if partition not in seen:
                seen.add(partition)
                cut = have.with_dims({axis.dim: partition})
                yield (cut, have) if axis.gathered else (cut,)


def _layout(program: Program, axis: TokenAxis) -> Layout:
    node = next(node for node in program.graph.nodes if node.name == axis.value)
    layout: Layout = node.meta.get(LAYOUT) or Layout.whole(len(node.meta[SPEC].shape))
    return layout
