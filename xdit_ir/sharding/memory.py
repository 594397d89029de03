"""How much memory every rank needs at most, worked out from sizes before anything runs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.graphs import operands, placeholders, results_of
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.partition import IntArray
from xdit_ir.ir.program import LAYOUT, SPEC, Program, TensorSpec, called_block, is_block_call
from xdit_ir.kernels.write_slice import writes_into_fresh
from xdit_ir.sharding.cost import relayout_bytes
from xdit_ir.sharding.gathered_weights import GatheredWeights, brings_weights
from xdit_ir.sharding.shared_out import ranks_needing

Sized = Callable[[fx.Node], IntArray]


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank's GPU at most: `weights` that it has, and those that it gathers or uploads for the moment;
    `activations`: inputs, and values of a forward that are there at a time, operator by operator; pieces of
    `exchanges` under way; `buffers` that outlive a step (PipeFusion); and copies of inputs and results that
    `recordings` read and write, where there are CUDA graphs. `host`: bytes of weights in the host's memory."""

    weights: int
    activations: int
    exchanges: int = 0
    buffers: int = 0
    recordings: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        """All of the GPU's."""
        return self.weights + self.activations + self.exchanges + self.buffers + self.recordings

    def __str__(self) -> str:
        parts = (
            f"{name} {size / 2**20:.1f}" for name, size in vars(self).items() if size and name not in ("host", "total")
        )
        text = f"{self.total / 2**20:.1f} MiB of a GPU ({', '.join(parts)})"
        return f"{text} and {self.host / 2**20:.1f} of the host" if self.host else text


@dataclass(frozen=True)
class Peaks:
    """Of every rank: bytes of values and of pieces under way that are there at a time at most, and of copies for
    recordings."""

    activations: Sequence[int]
    exchanges: Sequence[int]
    recordings: Sequence[int]


def memory_per_rank(program: Program, mesh: Mesh, gathered: GatheredWeights) -> list[Memory]:
    """That of a program with layouts."""
    found, ranks = peaks(program, mesh), range(mesh.world_size)
    held = {str(node.target): node for node in program.graph.find_nodes(op="get_attr")}
    held = {name: node for name, node in held.items() if name in program.state or name in program.stored}
    host, here = np.zeros(len(ranks), dtype=np.int64), np.zeros(len(ranks), dtype=np.int64)
    for name, node in held.items():
        stored = program.stored.get(name)
        kept = host if stored is not None and stored.on_host else here
        kept += _local_bytes(node, mesh)
    return [
        Memory(
            weights=int(here[rank]) + gathered.most,
            activations=found.activations[rank],
            exchanges=found.exchanges[rank],
            recordings=found.recordings[rank],
            host=int(host[rank]),
        )
        for rank in ranks
    ]


def peaks(program: Program, mesh: Mesh) -> Peaks:
    """Those of a program on the mesh of its layouts."""
    needing = {node: np.array(ranks, dtype=np.int64) for node, ranks in ranks_needing(program, mesh).items()}
    values, pieces = _Walk(mesh, _values(mesh, needing)), _Walk(mesh, _pieces(mesh), first_use=True)
    given = sum((_local_bytes(x, mesh) for x in placeholders(program.graph)), np.zeros(mesh.world_size, dtype=np.int64))
    copies = sum((_local_bytes(x, mesh) for x in results_of(program.graph)), given)
    return Peaks((values.most(program) + given).tolist(), pieces.most(program).tolist(), np.asarray(copies).tolist())


def most_at_once(nodes: Sequence[fx.Node], mesh: Mesh) -> int:
    """Bytes of values that are there at a time if a graph's nodes run in this order, without what its blocks need."""
    return int(max(_Walk(mesh, _values(mesh, {})).most_of(nodes, {})))


@dataclass(frozen=True)
class _Walk:
    """Something that operators make, of so many bytes on every rank, and that is there until its last use, or its
    first."""

    mesh: Mesh
    made: Sized
    first_use: bool = False

    def most(self, program: Program) -> IntArray:
        """The most that is there at a time, what blocks make included."""
        bodies = {name: self.most_of([*block.graph.nodes], {}) for name, block in program.blocks.items()}
        return self.most_of([*program.graph.nodes], bodies)

    def most_of(self, nodes: Sequence[fx.Node], bodies: Mapping[str, IntArray]) -> IntArray:
        """That of nodes in this order; `bodies`: what calls of blocks need meanwhile."""
        until: dict[fx.Node, int] = {}
        for place, node in enumerate(nodes):
            if self.first_use and ops.is_view(node.target):
                continue
            for source in map(behind_views, node.all_input_nodes):
                until[source] = min(until.get(source, place), place) if self.first_use else place
        ending: dict[int, list[fx.Node]] = {}
        for node, place in until.items():
            ending.setdefault(place, []).append(node)
        now, most, none = (np.zeros(self.mesh.world_size, dtype=np.int64) for _ in range(3))
        sizes: dict[fx.Node, IntArray] = {}
        for place, node in enumerate(nodes):
            sizes[node] = self.made(node)
            now = now + sizes[node]
            inside = bodies.get(called_block(node), none) - sizes[node] if is_block_call(node) else none
            most = np.maximum(most, now + np.maximum(inside, 0))
            now = now - sum((sizes[one] for one in ending.get(place, ())), none)
            now = now if node in until else now - sizes[node]
        return most


def _values(mesh: Mesh, needing: Mapping[fx.Node, IntArray]) -> Sized:
    """Results of operators, those of block calls one by one; views of others have no memory of their own, and weights
    are counted as such. `needing`: one for each rank that computes a node, if not all do."""
    none = np.zeros(mesh.world_size, dtype=np.int64)

    def made(node: fx.Node) -> IntArray:
        own = node.op == "call_function" and behind_views(node) is node and not brings_weights(node)
        own = own and not is_block_call(node)
        return _local_bytes(node, mesh) * needing.get(node, 1) if own else none

    return made


def _pieces(mesh: Mesh) -> Sized:
    """What is put together to be sent, which is there until the exchange is awaited; of a ring, keys and values that
    leave and arrive, and two partial results in single precision."""
    none = np.zeros(mesh.world_size, dtype=np.int64)

    def made(node: fx.Node) -> IntArray:
        if node.target is ops.ring_attention:
            _, k, v, *_ = operands(node)
            return 2 * (_local_bytes(k, mesh) + _local_bytes(v, mesh)) + 2 * _local_bytes(node, mesh, torch.float32)
        if not ops.communicates(node.target) or node.target is ops.all_reduce or brings_weights(node):
            return none
        if node.target is ops.halo_exchange:  # the piece that stays is what the rank had
            return np.array(relayout_bytes(node, mesh), dtype=np.int64)
        return _local_bytes(operands(node)[0], mesh)

    return made


def behind_views(node: fx.Node) -> fx.Node:
    """What has the memory of a value; the results of a block call have their own."""
    while (ops.is_view(node.target) or writes_into_fresh(node)) and (sources := node.all_input_nodes):
        if _is_result(node):
            break
        node = sources[0]
    return node


def _is_result(node: fx.Node) -> bool:
    return node.target is operator.getitem and is_block_call(node.all_input_nodes[0])


def _local_bytes(node: fx.Node, mesh: Mesh, dtype: torch.dtype | None = None) -> IntArray:
    """Of all results of a node, on every rank; as if they were of another type."""
    specs, layouts = node.meta.get(SPEC), node.meta.get(LAYOUT)
    pairs: Any = zip(specs, layouts, strict=True) if isinstance(specs, tuple) and layouts else [(specs, layouts)]
    placed = [(s, layout) for s, layout in pairs if isinstance(s, TensorSpec) and isinstance(layout, Layout)]
    typed = [(spec if dtype is None else TensorSpec(spec.shape, dtype), layout) for spec, layout in placed]
    ranks = range(mesh.world_size)
    return np.array([sum(spec.on(layout, rank).nbytes for spec, layout in typed) for rank in ranks], dtype=np.int64)
