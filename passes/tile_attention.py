"""`tile-attention`: queries gathered along one factor of a ring, keys along the other, where that takes less time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.facts import Fact
from xdit_ir.ir.graphs import bound_arguments, map_graphs, remove_dead
from xdit_ir.ir.layout import Layout, key_gather_dims
from xdit_ir.ir.mesh import TIME, Mesh
from xdit_ir.ir.partial_attention import merge_partials, partial_attention
from xdit_ir.ir.program import LAYOUT, SPEC, Program
from xdit_ir.passes.attention_tiles import Grid, Untiled, grids, seconds_as_it_is, seconds_in_tiles
from xdit_ir.passes.emit import Emitter
from xdit_ir.sharding.machine import Machine


@dataclass(frozen=True)
class TileAttention:
    """Choose, per attention that brings keys together, whether ranks rather compute tiles (Attention2D, arXiv
    2503.15758): of `a * b` ranks each gathers the queries of `a` and the keys of `b`, and what it finds for these goes
    back to the owners of the queries, who merge it by its log-sum-exp. That sends `a - 1` parts of queries, `b - 1` of
    keys and `a - 1` of results where a ring sends `a * b - 1` of keys, under its work. The least time on the machine,
    nothing hidden of what tiles exchange, decides; also between the ways to write the number of ranks as `a * b`.
    """

    name: ClassVar[str] = "tile-attention"
    numerics: ClassVar[str] = "reassociated"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.ATTENTION})

    machine: Machine = field(default_factory=Machine)

    def apply(self, program: Program) -> Program:
        """The program with such attentions in tiles."""
        mesh = program.mesh
        if mesh is None:
            return program
        return map_graphs(program, lambda graph: self._tile(graph, mesh))

    def _tile(self, graph: fx.Graph, mesh: Mesh) -> None:
        changed = False
        for node in [node for node in graph.nodes if node.target in ops.ATTENTIONS]:
            if (best := self._best(node, mesh)) is not None:
                write(Emitter(graph, node, mesh), *best)
                changed = True
        if changed:
            remove_dead(graph)

    def _best(self, node: fx.Node, mesh: Mesh) -> tuple[Untiled, Grid] | None:
        """The fastest way to compute it in tiles; None where as it is, it is as fast."""
        pairs = [(attention, grid) for attention in attentions(node, mesh) for grid in grids(attention, mesh)]
        seconds = [seconds_in_tiles(*pair, mesh, self.machine) for pair in pairs]
        if not pairs or min(seconds) >= seconds_as_it_is(node, mesh, self.machine):
            return None
        return pairs[seconds.index(min(seconds))]


def attentions(node: fx.Node, mesh: Mesh) -> Iterator[Untiled]:
    """An attention whose queries are divided over the ranks that its keys come from: as they are passed around, and as
    they were before they were gathered."""
    given = bound_arguments(node)
    q, k, v, mask = (given[name] for name in ("q", "k", "v", "mask"))
    if given["is_causal"]:
        return
    for keys, values in dict.fromkeys([(k, v), (before_gather(k), before_gather(v))]):
        layouts: list[Layout] = [x.meta[LAYOUT] for x in (q, keys, values)]
        dims = key_gather_dims(mesh, *layouts[:2])
        rows, columns = layouts[0].dims[-2], layouts[1].dims[-2]
        if not dims or TIME in dims or rows is None or columns is None or layouts[2].dims[-2] != columns:
            continue
        if mesh.dividing_dims(columns) == dims <= mesh.dividing_dims(rows) and mesh.tiles(rows) and mesh.tiles(columns):
            yield Untiled(node, q, keys, values, before_shard(mask), mesh.ordered(dims))


def before_gather(x: fx.Node) -> fx.Node:
    """Keys or values as each rank has made them."""
    source = x.args[0] if x.target is ops.gather else x
    assert isinstance(source, fx.Node)
    same = source.meta[LAYOUT].with_dims({-2: None}) == x.meta[LAYOUT].with_dims({-2: None})
    return source if same else x


def before_shard(mask: fx.Node | None) -> fx.Node | None:
    """A mask with as much of it as there is on every rank."""
    while mask is not None and mask.target is ops.shard:
        source = mask.args[0]
        assert isinstance(source, fx.Node)
        mask = source
    return mask


def write(emitter: Emitter, attention: Untiled, grid: Grid) -> None:
    """Replace an attention by its tiles."""
    node, taken = attention.node, dict[tuple[fx.Node, Layout], fx.Node]()

    def brought(x: fx.Node, layout: Layout) -> fx.Node:
        if (x, layout) not in taken:
            taken[x, layout] = emitter.relayout(x, layout)
        return taken[x, layout]

    args: list[Any] = [brought(x, layout) for x, layout in attention.operands(grid)]
    given = bound_arguments(node)
    options = {"scale": given["scale"], "enable_gqa": given["enable_gqa"]}
    parts = tuple(part.runs for part in grid.parts)
    tile = emitter.emit(partial_attention, *args, **options, parts=parts, spec=attention.tile_spec(grid))
    rows = emitter.relayout(tile, tile.meta[LAYOUT].with_dims({-2: grid.home}))
    merged = emitter.emit(merge_partials, rows, len(grid.parts))
    assert merged.meta[SPEC] == node.meta[SPEC]
    node.replace_all_uses_with(emitter.relayout(merged, node.meta[LAYOUT]))
