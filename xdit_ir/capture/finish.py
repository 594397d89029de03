"""From recorded graphs to a `Program`: equal bodies merged, tiny ones inlined, blocks named, state listed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from xdit_ir.capture.values import Frame
from xdit_ir.ir.flops import node_flops
from xdit_ir.ir.graphs import copy_node, expand_call, placeholders, remove_dead, weights_of
from xdit_ir.ir.program import (
    CONSTANT,
    SPEC,
    WEIGHT,
    WHERE,
    Block,
    TensorSpec,
    Where,
    called_block,
    is_block_call,
    qualified,
)

_WORTHWHILE = 0.01  # of all work
_LONG = 100  # nodes, which are not written twice
Bodies = dict[str, fx.Graph]


def prune(frame: Frame) -> list[int]:
    """Drop dead nodes of a finished graph, and dead arguments of a body; indices of the arguments kept."""
    remove_dead(frame.graph)
    if frame.parent is None:
        return list(range(len(frame.placeholders)))
    kept = [index for index, node in enumerate(frame.placeholders) if node.users]
    for node in frame.placeholders:
        if not node.users:
            frame.graph.erase_node(node)
    return kept


def merge_equal(graph: fx.Graph, bodies: Bodies, constants: Mapping[str, torch.Tensor]) -> Bodies:
    """Make calls of bodies with equal graphs name the first of them; returns the bodies that are left."""
    first: dict[Any, str] = {}
    same = {name: first.setdefault(graph_key(body, constants), name) for name, body in bodies.items()}
    for node in graph.nodes:
        if is_block_call(node):
            node.args = (same[called_block(node)], *node.args[1:])
    return {name: bodies[name] for name in first.values()}


def graph_key(graph: fx.Graph, constants: Mapping[str, torch.Tensor]) -> Any:
    """A value that is equal for graphs that compute the same."""
    order = {node: index for index, node in enumerate(graph.nodes)}

    def argument(item: Any) -> Any:
        if isinstance(item, fx.Node):
            return ("node", order[item])
        if isinstance(item, (list, tuple)):
            return tuple(argument(entry) for entry in item)
        if isinstance(item, slice):
            return ("slice", argument(item.start), argument(item.stop), argument(item.step))
        return (type(item), item)

    rows = []
    for node in graph.nodes:
        target = "" if node.op == "placeholder" else node.target
        if node.op == "get_attr" and str(target).startswith(f"{CONSTANT}."):
            target = _contents(constants[str(target).partition(".")[2]])
        kwargs = tuple((key, argument(item)) for key, item in sorted(node.kwargs.items()))
        rows.append((node.op, target, argument(node.args), kwargs, node.meta[SPEC]))
    return tuple(rows)


def _contents(tensor: torch.Tensor) -> Any:
    flat = tensor.detach().cpu().contiguous().flatten()
    return (
        tuple(tensor.shape),
        tensor.dtype,
        flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"",
    )


def inline_small(graph: fx.Graph, bodies: Bodies) -> Bodies:
    """Put bodies that do next to no work back into the outer graph, but for long ones that are called again; returns
    the bodies that are left."""
    work = {name: sum(map(node_flops, body.nodes)) for name, body in bodies.items()}
    calls = [node for node in graph.nodes if is_block_call(node)]
    count = Counter(map(called_block, calls))
    total = sum(map(node_flops, graph.nodes)) + sum(count[name] * work[name] for name in bodies)
    idle = {name for name in bodies if count[name] * work[name] < _WORTHWHILE * total}
    small = {name for name in idle if count[name] < 2 or len(bodies[name].nodes) < _LONG}
    for node in calls:
        if node.args[0] in small:
            expand_call(graph, node, bodies[called_block(node)])
    return {name: body for name, body in bodies.items() if name not in small}


def name_blocks(graph: fx.Graph, bodies: Bodies, kinds: Mapping[str, str]) -> dict[str, Block]:
    """Blocks named after their modules' classes, with a counter where needed; calls are renamed."""
    counts: dict[str, int] = {}
    names: dict[str, str] = {}
    for body in bodies:
        number = counts[kinds[body]] = counts.get(kinds[body], -1) + 1
        names[body] = f"{kinds[body]}_{number}" if number else kinds[body]
    for node in graph.nodes:
        if is_block_call(node):
            node.args = (names[called_block(node)], *node.args[1:])
    return {names[body]: Block(names[body], graph) for body, graph in bodies.items()}


def used_state(graph: fx.Graph, blocks: Mapping[str, Block]) -> tuple[dict[str, TensorSpec], set[str]]:
    """Specs of the parameters and buffers in use, by qualified name, and the names of constants in use."""
    state: dict[str, TensorSpec] = {}
    graphs = [("", graph)]
    graphs += [(str(node.args[1]), blocks[str(node.args[0])].graph) for node in graph.nodes if is_block_call(node)]
    for prefix, part in graphs:
        for node in part.nodes:
            if node.op == "get_attr":
                state[qualified(prefix, str(node.target))] = node.meta[SPEC]
    constants = {name.partition(".")[2] for name in state if name.startswith(f"{CONSTANT}.")}
    return {name: spec for name, spec in state.items() if not name.startswith(f"{CONSTANT}.")}, constants


def lift_weights(graph: fx.Graph, blocks: Mapping[str, Block], state: Mapping[str, TensorSpec]) -> dict[str, Block]:
    """Make the parameters that bodies name arguments, and give each call those of its layer."""
    lifted = {name: Block(name, _with_weights(block.graph)) for name, block in blocks.items()}
    held: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "get_attr":
            held.setdefault(str(node.target), node)
        if is_block_call(node):
            name, prefix, values = node.args
            needed = weights_of(lifted[str(name)].graph)
            with graph.inserting_before(node):
                for target in (qualified(str(prefix), key) for key in needed):
                    if target not in held:
                        held[target] = _weight(graph, target, state[target])
            node.args = (name, prefix, values, {key: held[qualified(str(prefix), key)] for key in needed})
    return lifted


def _weight(graph: fx.Graph, target: str, spec: TensorSpec) -> fx.Node:
    node = graph.create_node("get_attr", target, name=target.replace(".", "_"))
    node.meta.update({SPEC: spec, WHERE: Where(target.rpartition(".")[0])})
    return node


def _with_weights(body: fx.Graph) -> fx.Graph:
    """The body with a placeholder, behind the others, for each parameter that it names."""
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
    named = [n for n in body.nodes if n.op == "get_attr" and not str(n.target).startswith(f"{CONSTANT}.")]
    for node in placeholders(body):
        env[node] = graph.node_copy(node)
    for node in named:
        env[node] = graph.create_node("placeholder", node.name, name=node.name)
        env[node].meta = node.meta | {WEIGHT: str(node.target)}
    for node in body.nodes:
        if node not in env:
            env[node] = copy_node(graph, node, env.__getitem__)
    return graph


def rename_device(graph: fx.Graph, old: torch.device, new: torch.device) -> None:
    """Make the nodes that name one device name another."""
    for node in graph.nodes if old != new else ():
        if node.kwargs.get("device") == old:
            node.kwargs = {**node.kwargs, "device": new}
