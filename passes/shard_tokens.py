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
from xdit_ir.propagate import Propagation

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
    seeds: dict[str, Layout]


@dataclass(frozen=True)
class ShardTokens:
    """Propose partitions of the best token stream, propagate each, keep the cheapest, add further streams greedily.

    Proposals: contiguous and even; even within the segments into which the model cuts the stream; in whole units of
    a view's inner factor (rows, frames). Numerics: exact.
    """

    mesh: Mesh
    name: str = "shard-tokens"

    def apply(self, program: Program) -> Program:
        """The program with its token streams divided."""
        degree = self.mesh.size(SEQUENCE)
        if degree == 1:
            return program
        trial = Propagation(program, self.mesh)
        whole = max(program_flops(program, None)[0], 1)
        best: _Choice | None = None
        for axis in program.tokens:
            if best is not None and _layout(best.program, axis).dims[axis.dim] is not None:
                continue
            for layout in self._proposals(program, axis):
                seeds = {**(best.seeds if best else {}), axis.value: layout}
                result = trial.run(seeds)
                work = max(program_flops(result, self.mesh)) / whole
                price = Price(round(10_000 * work), moved_bytes(result, self.mesh))
                if best is None or price < best.price:
                    best = _Choice(price, result, seeds)
        if best is None:
            raise ParallelizeError(
                f"ulysses x ring = {degree} divides the tokens, but no attention of this model takes its queries "
                "from a token stream that could be divided; use ulysses=1, ring=1"
            )
        return best.program.replace(mesh=self.mesh)

    def _proposals(self, program: Program, axis: TokenAxis) -> Iterator[Layout]:
        have = _layout(program, axis)
        if have.dims[axis.dim] is not None:
            return
        seen = set()
        for unit, segments in itertools.product((1, *axis.units), ((), *axis.segments)):
            partition = self.mesh.divide(axis.size, SEQUENCE, unit, segments)
            if partition not in seen:
                seen.add(partition)
                yield have.with_dims({axis.dim: partition})


def _layout(program: Program, axis: TokenAxis) -> Layout:
    node = next(node for node in program.graph.nodes if node.name == axis.value)
    layout: Layout = node.meta.get(LAYOUT) or Layout.whole(len(node.meta[SPEC].shape))
    return layout
