"""Weights as ranks store them: their names and nodes, and those of which ranks compute with their own rows only."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import replace

from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.graphs import copy_graph, weights_of
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.program import LAYOUT, SPEC, STORED, Block, Program, Stored, TensorSpec, call_parts, is_block_call

Place = tuple[str, str]
"""A block, and the name of a weight in it."""


def fresh_name(weights: Sequence[str], taken: Collection[str]) -> str:
    """For what stores these weights: the path of the module that has all of them."""
    steps = zip(*(name.split(".")[:-1] for name in weights), strict=False)
    common = (parts[0] for parts in itertools.takewhile(lambda parts: len(set(parts)) == 1, steps))
    path = ".".join(common) or "model"
    names = itertools.chain([f"{STORED}.{path}"], (f"{STORED}.{path}-{count}" for count in itertools.count(2)))
    return next(name for name in names if name not in taken)


def part_layout(spec: TensorSpec, mesh: Mesh, dims: Collection[str]) -> Layout:
    """That of what is stored: of the first dimension, equal parts, if there are several."""
    whole = Layout.whole(len(spec.shape))
    return whole.with_dims({0: mesh.divide(spec.shape[0], dims)}) if mesh.size(dims) > 1 else whole


def stored_node(graph: fx.Graph, name: str, stored: Stored, layout: Layout) -> fx.Node:
    """A rank's part of what is stored, as a value in front of everything else."""
    with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
        node = graph.create_node("get_attr", name, name=name.replace(".", "_").replace("-", "_"))
    node.meta = {SPEC: stored.spec, LAYOUT: layout}
    return node


def cut_outside(program: Program, dims: Collection[str]) -> Program:
    """The program in which weights of which every use takes a part that differs along `dims` are stored as these parts,
    each kind of them once."""
    graph, stored, mesh = copy_graph(program.graph), dict(program.stored), program.mesh
    assert mesh is not None
    named: dict[str, list[fx.Node]] = {}
    for weight in graph.find_nodes(op="get_attr"):
        named.setdefault(str(weight.target), []).append(weight)
    for name, weights in named.items():
        parts = dict[Layout, list[fx.Node]]()
        for use in (use for weight in weights for use in weight.users):
            parts.setdefault(use.meta[LAYOUT] if use.target is ops.shard else Layout(()), []).append(use)
        if name not in program.state or not all(layout.dividing_dims(mesh) & {*dims} for layout in parts):
            continue
        for count, (layout, uses) in enumerate(parts.items(), 1):
            key = f"{STORED}.{name}" if count == 1 else f"{STORED}.{name}-{count}"
            stored.setdefault(key, Stored(weights[0].meta[SPEC], ((name, 0),)))  # else as an earlier program has it
            part = stored_node(graph, key, stored[key], layout)
            for use in uses:
                use.replace_all_uses_with(part)
                graph.erase_node(use)
        for weight in weights:
            graph.erase_node(weight)
    return program.replace(graph=graph, stored=stored)


def cut_weights(program: Program, mesh: Mesh, dims: Collection[str]) -> Program:
    """The program in which weights that are used by rows only, each rank's own, are stored so."""
    places = _cut_places(program, mesh, dims)
    if not places:
        return program
    blocks, graph, stored = dict(program.blocks), copy_graph(program.graph), dict(program.stored)
    for name in dict.fromkeys(block for block, _ in places):
        keys = [key for block, key in places if block == name]
        blocks[name] = replace(blocks[name], graph=_without_cuts(blocks[name], keys))
    rows: dict[str, fx.Node] = {}
    for call in [node for node in graph.nodes if is_block_call(node)]:
        block, _, _, weights = call_parts(call)
        for key, weight in weights.items():
            if (block, key) in places:
                name = str(weight.target)
                if name not in rows:
                    key = f"{STORED}.{name}"
                    stored.setdefault(key, Stored(weight.meta[SPEC], ((name, 0),)))
                    rows[name] = stored_node(graph, key, stored[key], part_layout(weight.meta[SPEC], mesh, dims))
                call.replace_input_with(weight, rows[name])
    return program.replace(graph=graph, blocks=blocks, stored=stored)


def _cut_places(program: Program, mesh: Mesh, dims: Collection[str]) -> set[Place]:
    """Where weights are used by rows in every use that they have, in all calls of the block."""
    users, given = _uses(program)
    cut = {place for place in given if _by_rows(program.blocks[place[0]], place[1], mesh, dims)}
    packed = {name for key, one in program.stored.items() for name, _ in one.members if key != f"{STORED}.{name}"}

    def stays(place: Place) -> bool:
        return all(name and name not in packed and users[name] <= cut for name in given[place])

    while (kept := set(filter(stays, cut))) != cut:
        cut = kept
    return cut


def _uses(program: Program) -> tuple[dict[str, set[Place | None]], dict[Place, set[str]]]:
    """Where each weight is used (None: elsewhere than as a weight of a block), and which each place is given, by name
    (empty: something that is no weight of the model)."""
    users: dict[str, set[Place | None]] = {}
    given: dict[Place, set[str]] = {}
    for node in program.graph.nodes:
        others = node.all_input_nodes
        if is_block_call(node):
            block, _, others, weights = call_parts(node)
            for key, weight in weights.items():
                own = str(weight.target) if weight.op == "get_attr" and str(weight.target) in program.state else ""
                given.setdefault((block, key), set()).add(own)
                users.setdefault(own, set()).add((block, key))
        for weight in others:
            users.setdefault(str(weight.target), set()).add(None)
    return users, given


def _by_rows(block: Block, key: str, mesh: Mesh, dims: Collection[str]) -> bool:
    """Whether a body takes each rank's part of a weight, and nothing else of it."""
    weight = weights_of(block.graph)[key]
    spec = weight.meta[SPEC]
    if not spec.shape or spec.shape[0] < mesh.size(dims):
        return False
    part = part_layout(spec, mesh, dims)
    return bool(weight.users) and all(u.target is ops.shard and u.meta[LAYOUT] == part for u in weight.users)


def _without_cuts(block: Block, keys: Sequence[str]) -> fx.Graph:
    """The body that is given the parts of these weights."""
    graph = copy_graph(block.graph)
    for key in keys:
        weight = weights_of(graph)[key]
        for cut in list(weight.users):
            weight.meta[LAYOUT] = cut.meta[LAYOUT]
            cut.replace_all_uses_with(weight)
            graph.erase_node(cut)
    return graph
