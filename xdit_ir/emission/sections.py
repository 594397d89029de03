"""A forward in sections: what is computed once, what the host runs at every call, and what CUDA graphs replay."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

import torch
from torch import fx

from xdit_ir.ir.graphs import operands
from xdit_ir.transport.mailbox import PeerSend


class RunBy(Enum):
    """Who runs a node of a forward."""

    ONCE = "once"  # it depends on constants only, and needs the host
    HOST = "host"  # at every call
    DEVICE = "device"  # nobody at a call: it is part of a CUDA graph


@dataclass(frozen=True, eq=False)
class Section:
    """Nodes of one kind as a function: `module(*takes)` gives the tuple of `gives`, all by the names of nodes."""

    kind: RunBy
    module: fx.GraphModule
    takes: tuple[str, ...]
    gives: tuple[str, ...]

    @property
    def computes(self) -> bool:
        """Whether there is more in it than other views of values."""
        return any(map(_computes, self.module.graph.nodes))

    @cached_property
    def talks(self) -> bool:
        """Whether something is sent by copies in it, which must be over before the next section."""
        return any(isinstance(module, PeerSend) for module in self.module.modules())


def cut_sections(run: fx.GraphModule, kinds: Mapping[fx.Node, RunBy]) -> list[Section]:
    """The sections of a forward, in order; `kinds` has every node but placeholders and the output.

    What is computed once, and what the host can do before anything else, come first. All else stays in its order, so
    that ranks which differ in `kinds` still talk in the same order.
    """
    groups: list[tuple[RunBy, list[fx.Node]]] = []
    for node in _ordered(run, kinds):
        if not groups or groups[-1][0] is not kinds[node]:
            groups.append((kinds[node], []))
        groups[-1][1].append(node)
    return [_section(run, kind, nodes) for kind, nodes in groups]


def _ordered(run: fx.GraphModule, kinds: Mapping[fx.Node, RunBy]) -> list[fx.Node]:
    nodes = [node for node in run.graph.nodes if node in kinds]
    late: set[fx.Node] = set()
    for node in nodes:
        if kinds[node] is RunBy.DEVICE or any(source in late for source in operands(node)):
            late.add(node)
    early = sorted((node for node in nodes if node not in late), key=lambda node: kinds[node] is not RunBy.ONCE)
    return [*early, *_with_followers([node for node in nodes if node in late], kinds)]


def _with_followers(nodes: Sequence[fx.Node], kinds: Mapping[fx.Node, RunBy]) -> Iterable[fx.Node]:
    """The nodes, what picks a result right behind what gave it, and waits before the host takes over: neither tuples
    nor what is on its way can be handed from one section to another."""
    done: set[fx.Node] = set()
    pending: dict[fx.Node, None] = {}

    def write(node: fx.Node) -> Iterable[fx.Node]:
        if node in done:
            return
        done.add(node)
        yield node
        for user in node.users:
            if user.target is operator.getitem and user in kinds:
                yield from write(user)
                pending.update(dict.fromkeys(other for other in user.users if _waits(other)))
        pending.pop(node, None)

    for node in nodes:
        if kinds[node] is not RunBy.DEVICE:
            for wait in list(pending):
                yield from write(wait)
        yield from write(node)


def _computes(node: fx.Node) -> bool:
    if node.op != "call_function":
        return node.op == "call_module"
    schema = getattr(node.target, "_schema", None)
    return node.target is not operator.getitem and not (schema and any(one.alias_info for one in schema.returns))


def _waits(node: fx.Node) -> bool:
    return node.op == "call_module" and str(node.target).startswith("wait_")


def _section(run: fx.GraphModule, kind: RunBy, nodes: Sequence[fx.Node]) -> Section:
    mine, graph, env = set(nodes), fx.Graph(), dict[fx.Node, fx.Node]()
    taken = dict.fromkeys(source for node in nodes for source in operands(node) if source not in mine)
    for source in taken:
        env[source] = graph.placeholder(source.name)
    for node in nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
    given = [node for node in nodes if any(user not in mine for user in node.users)]
    graph.output(tuple(env[node] for node in given))
    names = tuple(source.name for source in taken), tuple(node.name for node in given)
    return Section(kind, fx.GraphModule(run, graph), *names)


def insert_moves(
    run: fx.GraphModule, moved: Iterable[tuple[fx.Node, fx.Node]], device: torch.device
) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node], dict[fx.Node, fx.Node]]:
    """A copy of a forward in which for each `(node, operand)` the node gets the operand on `device`; itself, where
    nothing is to be moved.

    Returns:
        The copy, its node for every node, and the operand (a node of the copy) of every node that moves one.
    """
    wanted, graph, env = set(moved), fx.Graph(), dict[fx.Node, fx.Node]()
    if not wanted:
        return run, {node: node for node in run.graph.nodes}, {}
    copies: dict[fx.Node, fx.Node] = {}
    for node in run.graph.nodes:

        def given(source: fx.Node, node: fx.Node = node) -> fx.Node:
            if (node, source) not in wanted:
                return env[source]
            if source not in copies:
                copies[source] = graph.call_function(
                    torch.ops.aten._to_copy.default, (env[source],), {"device": device}
                )
            return copies[source]

        env[node] = graph.node_copy(node, given)
    return fx.GraphModule(run, graph), env, {copy: env[source] for source, copy in copies.items()}
