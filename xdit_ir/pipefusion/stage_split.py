"""Cut a program into the stages of a pipeline: what each computes, and what goes from each to the next."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from xdit_ir.errors import VerifyError
from xdit_ir.ir import ops
from xdit_ir.ir.flops import is_counted
from xdit_ir.ir.graphs import operands, placeholders
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.printer import node_type
from xdit_ir.ir.program import STAGE, Program, is_block_call, scope_of

Homes = dict[fx.Node, frozenset[int]]


@dataclass(frozen=True, eq=False)
class Stage:
    """One stage.

    Its program takes the model's inputs, then `receives`, values that the stage before sends from another rank, then
    `carried_in`, values that an earlier stage of the same rank holds for it. It returns `sends`, for the next stage,
    `carried_out`, for a later stage of its own rank, and then, in the last stage, the outputs of the model.
    """

    program: Program
    receives: tuple[str, ...]
    sends: tuple[str, ...]
    carried_in: tuple[str, ...] = ()
    carried_out: tuple[str, ...] = ()

    def counts(self) -> tuple[int, int]:
        """How many block calls and how many operators it computes."""
        calls = sum(map(is_block_call, self.program.graph.nodes))
        return calls, sum(node.op == "call_function" for node in self.program.graph.nodes) - calls

    def passed(self, names: Sequence[str], mesh: Mesh) -> list[str]:
        """What it sends or holds, as text with types."""
        values = {node.name: node for node in self.program.graph.nodes}
        nodes = [values[name] for name in names]
        once = (", once a step" if scope_of(node).is_once else "" for node in nodes)
        return [f"%{node.name}: {node_type(node, mesh)}{text}" for node, text in zip(nodes, once, strict=True)]


def cut_stages(program: Program, coordinates: Sequence[int]) -> tuple[Stage, ...]:
    """The stages of a program whose token stream has stages noted (`partition-stages`); `coordinates` says where along
    `pipefusion` each of them is computed.

    What has no stage of its own is repeated in every stage that wants it if that costs nothing, and is computed in the
    first one otherwise. Values go from neighbour to neighbour, or wait on a rank for a later stage of that rank.
    """
    homes = stage_homes(program.graph, len(coordinates))
    routes = {node: _Route(coordinates, set(homes[node])) for node in program.graph.nodes}
    for node in program.graph.nodes:
        for source in operands(node):
            for stage in sorted(homes[node] - homes[source]):
                if min(homes[source]) > stage:
                    raise VerifyError(f"{node.name} of stage {stage} needs {source.name}, which a later stage computes")
                routes[source].bring(stage)
    return tuple(_stage(program, homes, routes, stage) for stage in range(len(coordinates)))


class _Route:
    """How a value gets from the stages that compute it to those that want it, with the fewest messages."""

    def __init__(self, coordinates: Sequence[int], has: set[int]) -> None:
        self.coordinates, self.has = coordinates, has
        self.messages: set[int] = set()
        self.waits: dict[int, int] = {}

    def bring(self, stage: int) -> None:
        """Bring the value to a stage, from the one before, or from an earlier one of the same rank."""
        if stage in self.has:
            return
        source = min(self._sources(stage), key=self._distance)
        self.bring(source)
        self.has.add(stage)
        if self.coordinates[source] == self.coordinates[stage]:
            self.waits[stage] = source
        else:
            self.messages.add(stage)

    def _sources(self, stage: int) -> list[int]:
        """Where a stage can have it from: those of its own rank first, which cost nothing."""
        mine = [other for other in range(stage) if self.coordinates[other] == self.coordinates[stage]]
        return mine if stage - 1 in mine else [*mine, stage - 1]

    def _distance(self, stage: int) -> float:
        """Messages until a stage has it."""
        if stage in self.has:
            return 0
        costs = (self._distance(s) + (self.coordinates[s] != self.coordinates[stage]) for s in self._sources(stage))
        return min(costs) if stage > 0 else float("inf")


def _follows(node: fx.Node) -> bool:
    """Whether whoever wants a value is to make it from its source."""
    return ops.is_relayout(node.target) or node.target in (ops.upload, ops.unpack)


def stage_homes(graph: fx.Graph, count: int) -> Homes:
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
        elif node.op == "get_attr" or node in free or _follows(node) or not users:
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


def _stage(program: Program, homes: Homes, routes: Mapping[fx.Node, _Route], stage: int) -> Stage:
    receives = [node for node, route in routes.items() if stage in route.messages]
    sends = [node for node, route in routes.items() if stage + 1 in route.messages]
    carried_in = [node for node, route in routes.items() if stage in route.waits]
    carried_out = [node for node, route in routes.items() if stage in route.waits.values()]
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in [*placeholders(program.graph), *receives, *carried_in]:
        env[node] = graph.create_node("placeholder", node.name, name=node.name)
        env[node].meta = dict(node.meta)
    results: tuple[fx.Node, ...] = ()
    for node in program.graph.nodes:
        if node.op == "output" and stage in homes[node]:
            results = tuple(operands(node))
        elif node not in env and stage in homes[node]:
            env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(tuple(env[node] for node in (*sends, *carried_out, *results)))
    names = [tuple(node.name for node in nodes) for nodes in (receives, sends, carried_in, carried_out)]
    return Stage(program.with_graph(graph), *names)
