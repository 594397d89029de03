"""Cut a program into the stages of a pipeline: what each computes, and what goes from each to the next."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import fx

from xdit_ir import ops
from xdit_ir.cost import is_counted
from xdit_ir.errors import VerifyError
from xdit_ir.program import STAGE, Program, is_block_call
from xdit_ir.rules.base import operands

Homes = dict[fx.Node, frozenset[int]]


@dataclass(frozen=True, eq=False)
class Stage:
    """One stage: its program takes the model's inputs and then `receives`, the names of values of earlier stages; it
    returns `sends`, what later stages want, and then, in the last stage, the outputs of the model."""

    program: Program
    receives: tuple[str, ...]
    sends: tuple[str, ...]


def cut_stages(program: Program, count: int) -> tuple[Stage, ...]:
    """The stages of a program whose token stream has stages noted (`partition-stages`).

    What has no stage of its own is repeated in every stage that wants it if that costs nothing, and is computed in the
    first one otherwise. Values go from neighbour to neighbour.
    """
    homes = _homes(program.graph, count)
    wanted: list[set[fx.Node]] = [set() for _ in range(count)]
    for node, stages in homes.items():
        for source in operands(node):
            for stage in stages - homes[source]:
                if min(homes[source]) > stage:
                    raise VerifyError(f"{node.name} of stage {stage} needs {source.name}, which a later stage computes")
                for between in range(max(s for s in homes[source] if s < stage) + 1, stage + 1):
                    wanted[between].add(source)
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    incoming = [sorted(values, key=order.__getitem__) for values in wanted]
    return tuple(
        _stage(program, homes, stage, incoming[stage], incoming[stage + 1] if stage + 1 < count else [])
        for stage in range(count)
    )


def _homes(graph: fx.Graph, count: int) -> Homes:
    """The stages that compute each node; empty where nothing wants it."""
    free = _free(graph)
    every = frozenset(range(count))
    homes: Homes = {}
    for node in reversed(list(graph.nodes)):
        users = frozenset[int]().union(*(homes[user] for user in node.users))
        if node.op == "output":
            homes[node] = frozenset({count - 1})
        elif node.op == "placeholder":
            homes[node] = every
        elif STAGE in node.meta and users:
            homes[node] = frozenset({node.meta[STAGE]})
        elif node.op == "get_attr" or node in free or ops.is_relayout(node.target) or not users:
            homes[node] = users
        else:
            homes[node] = frozenset({min(users)})
    for node in graph.nodes:
        if node.target is operator.getitem and homes[node]:
            homes[node] = homes[operands(node)[0]]
    return homes


def _free(graph: fx.Graph) -> set[fx.Node]:
    """Operators without a stage that need no weights and multiply nothing: as good as the inputs they are made from."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function" or STAGE in node.meta or is_block_call(node):
            continue
        sources = operands(node)
        if all(source.op == "placeholder" or source in found for source in sources) and not is_counted(node):
            found.add(node)
    return found


def _stage(program: Program, homes: Homes, stage: int, incoming: list[fx.Node], outgoing: list[fx.Node]) -> Stage:
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    inputs = [node for node in program.graph.nodes if node.op == "placeholder"]
    for node in [*inputs, *incoming]:
        env[node] = graph.create_node("placeholder", node.name, name=node.name)
        env[node].meta = dict(node.meta)
    results: tuple[fx.Node, ...] = ()
    for node in program.graph.nodes:
        if node.op == "output" and stage in homes[node]:
            results = tuple(operands(node))
        elif node not in env and stage in homes[node]:
            env[node] = graph.node_copy(node, env.__getitem__)
            env[node].meta = dict(node.meta)
    graph.output(tuple(env[node] for node in (*outgoing, *results)))
    used = {str(node.args[0]) for node in graph.nodes if is_block_call(node)}
    blocks = {name: block for name, block in program.blocks.items() if name in used}
    names = [tuple(node.name for node in nodes) for nodes in (incoming, outgoing)]
    return Stage(program.replace(graph=graph, blocks=blocks), *names)
