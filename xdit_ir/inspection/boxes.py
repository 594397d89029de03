"""Which operators around the blocks make one box of the picture, and which calls are shown as one run."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import networkx
from torch import fx

from xdit_ir.ir.graphs import operands
from xdit_ir.ir.program import Program, is_block_call, where_of

Group = tuple[fx.Node, ...]


@dataclass(frozen=True)
class Key:
    """What nodes of one box have in common: their module, stage, and (else 0) how many calls come before."""

    module: str
    stage: int = -1
    after: int = 0
    alone: str = ""


def owners(program: Program, stages: Mapping[str, int]) -> dict[fx.Node, Group]:
    """For every node of the outer graph that is shown the group that it belongs to; groups form an acyclic graph.

    Calls, inputs and the output are alone; their picked results belong to the call. Other operators are together that
    belong to the same module (next to the root, or the same layer) and stage; those of the root, if connected.
    """
    exact = _keys(program, stages)
    coarse = {node: replace(key, after=0) if key.module else key for node, key in exact.items()}
    around_calls = set()
    for cycle in _cycles(coarse):
        if len(cycle) > 1 and any(key.alone for key in cycle):
            around_calls |= cycle
    keys = {node: exact[node] if key in around_calls else key for node, key in coarse.items()}
    return _acyclic(_absorbed(_connected(keys), keys))


def _keys(program: Program, stages: Mapping[str, int]) -> dict[fx.Node, Key]:
    keys: dict[fx.Node, Key] = {}
    after: dict[fx.Node, int] = {}
    calls = 0
    for node in program.graph.nodes:
        if node.op == "get_attr":
            continue
        sources = [source for source in operands(node) if source in after]
        after[node] = max((after[source] for source in sources), default=0)
        if is_block_call(node):
            calls += 1
            after[node] = calls
            keys[node] = Key("", alone=node.name)
        elif node.target is operator.getitem and is_block_call(sources[0]):
            keys[node] = keys[sources[0]]
        elif node.op != "call_function":
            keys[node] = Key("", alone=node.name)
        else:
            keys[node] = Key(module_of(where_of(node).module), stages.get(node.name, -1), after[node])
    return keys


def module_of(path: str) -> str:
    """The module next to the root that a path leads through; of a list of layers, the layer."""
    names = path.split(".")
    return ".".join(names[: 2 if len(names) > 1 and names[1].isdigit() else 1])


def _cycles(numbers: Mapping[fx.Node, Any]) -> list[set[Any]]:
    """Sets of groups that need each other."""
    graph: networkx.DiGraph[Any] = networkx.DiGraph()
    graph.add_nodes_from(numbers.values())
    for node, number in numbers.items():
        graph.add_edges_from((numbers[s], number) for s in node.all_input_nodes if s in numbers)
    return list(networkx.strongly_connected_components(graph))


def _absorbed(numbers: Mapping[fx.Node, int], keys: Mapping[fx.Node, Key]) -> dict[fx.Node, int]:
    """Operators of the model's own code that serve one other group of operators only are part of that one."""
    result = dict(numbers)
    users: dict[int, set[int]] = {}
    for node, number in numbers.items():
        for source in node.all_input_nodes:
            if numbers.get(source, number) != number:
                users.setdefault(numbers[source], set()).add(number)
    alone = {number for node, number in numbers.items() if keys[node].alone}
    own = {number for node, number in numbers.items() if not keys[node].module} - alone
    into = {number: next(iter(users[number])) for number in own if len(users.get(number, ())) == 1}
    for node in result:
        while result[node] in into and into[result[node]] not in alone:
            result[node] = into[result[node]]
    return result


def _connected(keys: Mapping[fx.Node, Key]) -> dict[fx.Node, int]:
    """Numbers of the groups of nodes with equal keys, those of the root divided into connected ones."""
    same: networkx.Graph[fx.Node] = networkx.Graph()
    firsts: dict[Key, fx.Node] = {}
    for node, key in keys.items():
        same.add_node(node)
        same.add_edges_from((source, node) for source in node.all_input_nodes if keys.get(source) == key)
        if key.module:
            same.add_edge(firsts.setdefault(key, node), node)
    found: dict[fx.Node, int] = {}
    for number, component in enumerate(networkx.connected_components(same)):
        found.update(dict.fromkeys(component, number))
    return {node: found[node] for node in keys}


def _acyclic(numbers: Mapping[fx.Node, int]) -> dict[fx.Node, Group]:
    """Groups that need each other become one."""
    merged = {number: place for place, cycle in enumerate(_cycles(numbers)) for number in cycle}
    members: dict[int, list[fx.Node]] = {}
    for node, number in numbers.items():
        members.setdefault(merged[number], []).append(node)
    groups = {place: tuple(nodes) for place, nodes in members.items()}
    return {node: groups[merged[number]] for node, number in numbers.items()}


def runs(kinds: Mapping[str, Hashable], edges: Iterable[tuple[str, str]]) -> dict[str, int]:
    """Which boxes may be shown as one: the number of the run of each box that has a kind, in their order.

    Layers of one kind are one run, behind each other or side by side, as long as the picture stays acyclic.
    """
    graph: networkx.DiGraph[str] = networkx.DiGraph(list(edges))
    graph.add_nodes_from(kinds)
    latest: dict[Hashable, str] = {}
    found: dict[str, int] = {}
    for box, kind in kinds.items():
        run = latest.get(kind)
        if run is None or _comes_between(graph, run, box):
            latest[kind] = box
            found[box] = len(set(found.values()))
        else:
            networkx.contracted_nodes(graph, run, box, self_loops=False, copy=False)
            found[box] = found[run]
    return found


def _comes_between(graph: networkx.DiGraph[str], run: str, box: str) -> bool:
    """Whether a way leads from the run to the box, or back, through anything else."""
    ways = [*graph.successors(run)], [*graph.successors(box)]
    return any(networkx.has_path(graph, next_, box) for next_ in ways[0] if next_ != box) or any(
        networkx.has_path(graph, next_, run) for next_ in ways[1] if next_ != run
    )
