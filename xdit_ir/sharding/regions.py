"""Which part of a model an operator comes from, how ranks share the work of each part, and which of them idle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import fx

from xdit_ir.ir.flops import is_counted
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.program import Program, called_block, is_block_call, where_of
from xdit_ir.sharding.cost import outer_flops
from xdit_ir.sharding.shared_out import ranks_needing

# Modules are told apart as far down as that gives no more regions than these.
READABLE = 12
# What ranks share out whole, each other parts of it.
SHARED_OUT = "shared out"
# A region of less than this part of all FLOPs is not worth a word.
NOTABLE = 0.01


@dataclass(frozen=True)
class Region:
    """A part of the model: all calls of one kind of block, what stands before, between or behind blocks, or a module
    where blocks do less than half of the work. FLOPs of a forward on one device and per rank.
    """

    name: str
    flops_total: int
    flops_per_rank: list[int]

    @property
    def share(self) -> float:
        """The part of the region's FLOPs that its slowest rank does."""
        return max(self.flops_per_rank) / self.flops_total


@dataclass(frozen=True)
class Idle:
    """A rank that does less than half of a fair share of a forward, or nothing of a `region` that others divide."""

    rank: int
    share: float
    region: str = ""

    def __str__(self) -> str:
        if self.region:
            return f"rank {self.rank} idles in {self.region}: it does nothing there"
        return f"rank {self.rank} idles: it does {self.share:.4f} of a forward"


def block_region(block: str) -> str:
    """The region of a block: that of all its variants, which are called `Block`, `Block.2`, ..."""
    return block.partition(".")[0]


def region_names(program: Program) -> dict[fx.Node, str]:
    """The region of every block call and, where FLOPs are counted, operator of the outer graph, in their order; what
    is shared out is a region of its own."""
    calls = {call: block_region(called_block(call)) for call in program.calls}
    flops = outer_flops(program, None)
    mostly_blocks = 2 * sum(flops[call][0] for call in calls) >= sum(one for (one,) in flops.values())
    found = calls | (_by_place if mostly_blocks else _by_module)(program)
    if (mesh := program.layout_mesh) is not None:
        found |= {node: SHARED_OUT for node in ranks_needing(program, mesh) if node in found}
    return {node: found[node] for node in program.graph.nodes if node in found}


def _by_place(program: Program) -> dict[fx.Node, str]:
    """By where nodes stand among the block calls."""
    nodes, behind, before = list(program.graph.nodes), set[fx.Node](), set[fx.Node]()
    for node in nodes:
        if is_block_call(node) or any(source in behind for source in node.all_input_nodes):
            behind.add(node)
    for node in reversed(nodes):
        if is_block_call(node) or any(user in before for user in node.users):
            before.add(node)
    leading = {True: "between blocks", False: "prologue"}
    return {node: leading[node in behind] if node in before else "epilogue" for node in nodes if is_counted(node)}


def _by_module(program: Program) -> dict[fx.Node, str]:
    """By how module paths begin, told apart as far down as can be read."""
    paths = {node: where_of(node).module.split(".") for node in program.graph.nodes if is_counted(node)}

    def names(depth: int) -> dict[fx.Node, str]:
        return {node: ".".join(path[:depth]) or program.name for node, path in paths.items()}

    depths = range(2, max(map(len, paths.values()), default=1) + 1)
    return names(max((depth for depth in depths if len({*names(depth).values()}) <= READABLE), default=1))


def region_flops(program: Program, names: dict[fx.Node, str], mesh: Mesh | None) -> dict[str, list[int]]:
    """FLOPs of every region per rank (one entry without a mesh), in the order of the data flow."""
    flops, total = outer_flops(program, mesh), dict[str, list[int]]()
    for node, name in names.items():
        total[name] = list(map(sum, zip(flops[node], total.get(name, [0] * len(flops[node])), strict=True)))
    return total


def find_regions(totals: dict[str, list[int]], per_rank: dict[str, list[int]]) -> list[Region]:
    """The regions in which anything is computed, from what `region_flops` gives without a mesh, and per rank."""
    return [Region(name, whole, per_rank[name]) for name, (whole,) in totals.items() if whole]


def find_idle(
    flops_per_rank: list[int], fair: float, flops_total: int, regions: Sequence[Region] = ()
) -> Iterator[Idle]:
    """The ranks that idle, where `fair` is the part of a forward, and of each of the regions, that each should do."""
    for rank, flops in enumerate(flops_per_rank):
        share = flops / max(flops_total, 1)
        if flops_total and share < fair / 2:
            yield Idle(rank, share)
            continue
        for region in regions:
            if not region.flops_per_rank[rank] and region.flops_total >= NOTABLE * flops_total:
                yield Idle(rank, share, region.name)
