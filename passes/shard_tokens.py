"""`shard-tokens`: divide the token streams over the mesh dims `ring` and `ulysses`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from xdit_ir import ops
from xdit_ir.cost import program_flops, relayout_bytes
from xdit_ir.errors import ParallelizeError
from xdit_ir.layout import Layout
from xdit_ir.mesh import Mesh
from xdit_ir.program import LAYOUT, Program, TokenAxis
from xdit_ir.propagate import Propagation

SEQUENCE = ("ring", "ulysses")


@dataclass(frozen=True, order=True)
class Price:
    """What a partition costs: work of the slowest rank (in 1/10000 of one device), then bytes between ranks."""

    work: int
    bytes: int


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
        if not program.tokens:
            raise ParallelizeError(
                "no attention of this model has queries that come from a token stream: ulysses and ring must be 1"
            )
        trial = Propagation(program, self.mesh)
        best: tuple[Price, Program] | None = None
        chosen: dict[str, Layout] = {}
        for place, axis in enumerate(program.tokens):
            if best is not None and self._divided(best[1], axis):
                continue
            for layout in self._proposals(program, axis):
                seeds = {**chosen, axis.value: layout}
                result = trial.run(seeds)
                price = self.price(result, program)
                if best is None or price < best[0]:
                    best, kept = (price, result), seeds
            if place == 0 or best is not None:
                chosen = kept
        assert best is not None
        return best[1].replace(mesh=self.mesh)

    def price(self, program: Program, original: Program) -> Price:
        """Price of a program with layouts."""
        work = max(program_flops(program, self.mesh)) / max(program_flops(original, None)[0], 1)
        moved = 0
        calls = [str(node.args[0]) for node in program.calls]
        for graph, count in ((program.graph, 1), *((b.graph, calls.count(n)) for n, b in program.blocks.items())):
            for node in graph.nodes:
                if ops.is_relayout(node.target) and node.target is not ops.shard:
                    moved += count * max(relayout_bytes(node, self.mesh))
        return Price(round(10_000 * work), moved)

    def _proposals(self, program: Program, axis: TokenAxis) -> Iterator[Layout]:
        have = _layout(program, axis.value)
        if have.dims[axis.dim] is not None:
            return
        seen = set()
        for unit, segments in itertools.product((1, *axis.units), ((), *axis.segments)):
            partition = self.mesh.divide(axis.size, SEQUENCE, unit, segments)
            if partition not in seen:
                seen.add(partition)
                yield have.with_dims({axis.dim: partition})

    def _divided(self, program: Program, axis: TokenAxis) -> bool:
        layouts: Mapping[str, Layout] = {n.name: n.meta[LAYOUT] for n in program.graph.nodes if LAYOUT in n.meta}
        layout = layouts.get(axis.value)
        return layout is not None and layout.dims[axis.dim] is not None


def _layout(program: Program, name: str) -> Layout:
    node = next(node for node in program.graph.nodes if node.name == name)
    return node.meta.get(LAYOUT) or Layout.whole(len(node.meta["spec"].shape))
