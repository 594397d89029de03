"""What a division over time is worth: how much is divided, and what would be stale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.dataflow import Nodes, reach
from xdit_ir.ir.flops import is_counted
from xdit_ir.ir.graphs import OUTER, all_graphs, operands, placeholders, results_of
from xdit_ir.ir.hoist import ancestors
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import TIME, Mesh
from xdit_ir.ir.program import LAYOUT, SPEC, WHERE, Program, is_block_call, is_weight
from xdit_ir.pipefusion.latents import latents
from xdit_ir.rules.norms import divided_statistics
from xdit_ir.sharding.buffer_access import is_divided_over_time, over_time
from xdit_ir.sharding.machine import Machine, program_work

aten = torch.ops.aten
COVERAGE = 0.9
UNLIKE = "the output is not divided like the latents"
# Products of two values: what one token gets of another there is a mixture, not its own stream.
PRODUCTS = (aten.matmul, aten.bmm, aten.baddbmm, aten.mm, aten.einsum)


@dataclass(frozen=True, order=True)
class PatchPrice:
    """Work of all patches together and of the slowest (in 1/1000 of one device), bytes published in between."""

    work: int
    bytes: int
    slowest: int


@dataclass(frozen=True)
class PatchPlan:
    """A division, its price, and why it is refused (empty: it is not)."""

    program: Program
    price: PatchPrice
    refusal: str


def evaluate(program: Program, mesh: Mesh, machine: Machine) -> PatchPlan:
    """Price a division over time for a machine, and refuse it with a reason where it would not be PipeFusion."""
    found = latents(program, mesh)
    seeds = {OUTER: {node for node in placeholders(program.graph) if node.name in found}}
    dependent = reach(program, seeds)
    covered, price = _work(program, mesh, machine, dependent)
    refusal = ""
    if not found:
        refusal = f"{UNLIKE} ({_line(_end_of_division(program, mesh))})"
    elif covered < COVERAGE:
        refusal = f"only {covered:.0%} of the work that depends on the latents are divided"
    else:
        refusal = _stale(program, mesh, dependent)
    return PatchPlan(program, price, refusal)


def _end_of_division(program: Program, mesh: Mesh) -> fx.Node:
    """The last operator before an output for which patches need rows of each other; the output if there is none."""
    outputs = results_of(program.graph)
    before = ancestors(outputs)
    behind = [node for node in program.graph.nodes if node in before and over_time(node, mesh)]
    return behind[-1] if behind else outputs[0]


def _line(node: fx.Node) -> str:
    return getattr(node.meta.get(WHERE), "source", "") or "outer graph"


def _work(program: Program, mesh: Mesh, machine: Machine, dependent: Nodes) -> tuple[float, PatchPrice]:
    """The share of latent-dependent work that is divided, and the price of the division."""
    tail = _tail(program, mesh)
    patches, space = mesh.size((TIME,)), mesh.world_size // mesh.size((TIME,))
    total = split = work = published = 0
    per_rank = [0] * mesh.world_size
    for name, graph, count in all_graphs(program):
        for node in graph.nodes:
            if over_time(node, mesh):
                published += count * node.meta[SPEC].nbytes
            if not is_counted(node):
                continue
            each = [count * amount for amount in machine.node_work(node, mesh)]
            divided = is_divided_over_time(node, mesh) or any(
                is_divided_over_time(source, mesh) for source in operands(node)
            )
            once = not divided and (node not in dependent[name] or (name == OUTER and node in tail))
            cost = sum(each) // patches if once else sum(each)
            work += cost
            if not once:
                per_rank = [a + b for a, b in zip(per_rank, each, strict=True)]
            if node in dependent[name]:
                whole = cost if divided or once else cost // patches
                total += whole
                split += whole if divided or once else 0
    scale = 1000 / max(work, 1)
    slowest = max(per_rank) * space
    whole_work = max(1, program_work(program, machine))
    return split / max(total, 1), PatchPrice(round(1000 * work / whole_work), published, round(scale * slowest))


def _needs_patches(node: fx.Node, mesh: Mesh) -> bool:
    """Whether it, or what it will be lowered to, needs other patches: also a norm over what is divided over time."""
    sources = operands(node)
    return over_time(node, mesh) or bool(sources and TIME in divided_statistics(node, sources[0].meta[LAYOUT], mesh))


def _tail(program: Program, mesh: Mesh) -> set[fx.Node]:
    """Outer nodes that nothing follows which other patches need: the last patch alone computes them."""
    found: set[fx.Node] = set()
    for node in reversed(list(program.graph.nodes)):
        if node.op == "output" or (
            not is_block_call(node) and all(user in found and not _needs_patches(user, mesh) for user in node.users)
        ):
            found.add(node)
    return found


def _stale(program: Program, mesh: Mesh, dependent: Nodes) -> str:
    """Why the residual stream would be stale: an operator whose result has rows that other patches computed."""
    tail = _tail(program, mesh)
    seeds: Nodes = {}
    first: fx.Node | None = None
    for name, graph, _ in all_graphs(program):
        for node in graph.nodes:
            wide = over_time(node, mesh) and node.target not in (*ops.SUMS, ops.halo_exchange)
            wide = wide and not _held_first(operands(node)[0].meta[LAYOUT], mesh)
            if wide and node in dependent[name] and not (name == OUTER and node in tail):
                seeds.setdefault(name, set()).add(node)
                first = first or node
    if first is None:
        return ""
    hit = reach(program, seeds, _hands_on)
    if not any(source in hit[OUTER] for source in results_of(program.graph)):
        return ""
    return f"{first.name} would read stale rows into the token stream ({_line(first)})"


def _held_first(layout: Layout, mesh: Mesh) -> bool:
    """Whether the first patch has everything, so that whoever reads it reads what is of this step."""
    rest = [rank for rank in range(mesh.world_size) if mesh.index(rank, (TIME,))]
    return any(dim is not None and not any(dim.sizes[rank] for rank in rest) for dim in layout.dims)


def _hands_on(node: fx.Node, hit: list[bool]) -> bool:
    if node.target in ops.ATTENTIONS:
        return hit[0]
    if node.target in ops.SUMS:
        return False
    if getattr(node.target, "overloadpacket", None) in PRODUCTS:
        return any(is_weight(source) for source in operands(node))
    return True
