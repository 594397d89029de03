"""`pace-pulls`: weights that are fetched beside a block travel between its exchanges."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.collective_ops import ALL, AllGather, PeerExchange
from xdit_ir.ir.facts import Fact
from xdit_ir.ir.flops import flops_as
from xdit_ir.ir.graphs import copy_graph, operands, takers
from xdit_ir.ir.program import SPEC, Program, TensorSpec, called_block, is_block_call
from xdit_ir.kernels.attention import KernelAttention
from xdit_ir.kernels.linear_gelu import linear_gelu
from xdit_ir.sharding.machine import H100, Machine

aten = torch.ops.aten


@dataclass(frozen=True)
class PacePulls:
    """What copy engines fetch of weights beside a block is divided over its time: a part when it begins, and one behind
    each of its exchanges. An engine does what it was given first, so that exchanges of the block would wait for all of
    it. Parts are in proportion to the time until the next exchange, less what exchanges take, by the speeds of
    `machine`; nothing begins between exchanges that do not wait for each other, as of queries, keys and values: a
    compiler may write them one behind the other.
    """

    name: ClassVar[str] = "pace-pulls"
    numerics: ClassVar[str] = "exact"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.LOCAL})

    machine: Machine = H100

    def apply(self, program: Program) -> Program:
        """The program in which gathers of weights and exchanges of blocks say how much begins with them."""
        graph = copy_graph(program.graph)
        beside = {node: call for node, call in _followed(graph) if not _needs(call, node)}
        blocks, shares = dict(program.blocks), dict[str, Sequence[int]]()
        for name in dict.fromkeys(map(called_block, beside.values())):
            body = copy_graph(blocks[name].graph)
            exchanges = [node for node in body.nodes if isinstance(node.target, PeerExchange)]
            shares[name] = self._shares(body)
            for node, share in zip(exchanges, shares[name][1:], strict=True):
                node.target = replace(node.target, behind=share)
            blocks[name] = replace(blocks[name], graph=body)
        for node, call in beside.items():
            assert isinstance(node.target, AllGather)
            node.target = replace(node.target, first=shares[called_block(call)][0])
        return program.replace(graph=graph, blocks=blocks)

    def _shares(self, body: fx.Graph) -> list[int]:
        """Thousandths that begin to travel with a block, and behind each of its exchanges."""
        now, begins, taken, steps = 0.0, [0.0], [0.0], [0]
        step: dict[fx.Node, int] = {}
        for node in body.nodes:
            step[node] = max(map(step.__getitem__, node.all_input_nodes), default=0)
            if isinstance(node.target, PeerExchange):
                step[node] += 1
                steps.append(step[node])
                begins.append(now)
                taken.append(self.machine.seconds(0, node.meta[SPEC].nbytes))
            else:
                now += self._seconds(node)
        pairs = itertools.pairwise([*begins, now])
        free = [max(end - begin - busy, 0.0) for (begin, end), busy in zip(pairs, taken, strict=True)]
        last = [one != other for one, other in itertools.pairwise([*steps, None])]
        free = [each * ends for each, ends in zip(free, last, strict=True)]
        parts = [int(ALL * each / sum(free)) if any(free) else 0 for each in free]
        return [ALL - sum(parts[1:]), *parts[1:]]

    def _seconds(self, node: fx.Node) -> float:
        spec = node.meta.get(SPEC)
        if node.op != "call_function" or not isinstance(spec, TensorSpec) or ops.is_view(node.target):
            return 0.0
        target = ops.attention if isinstance(node.target, KernelAttention) else node.target
        target = aten.linear if target is linear_gelu else target
        flops = flops_as(node, target, [source.meta[SPEC].shape for source in operands(node)], spec.shape)
        return max(self.machine.seconds(flops, 0), self.machine.writing(spec.nbytes))


def _followed(graph: fx.Graph) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Gathers of weights, and the block call behind each."""
    waiting: list[fx.Node] = []
    for node in graph.nodes:
        if isinstance(node.target, AllGather):
            waiting.append(node)
        elif is_block_call(node):
            yield from ((one, node) for one in waiting)
            waiting.clear()


def _needs(call: fx.Node, gathered: fx.Node) -> bool:
    """Whether a call takes what is gathered, or a view of it."""
    return call in takers(gathered, lambda user: ops.is_view(user.target))
