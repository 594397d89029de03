"""What a pipeline costs in a displaced step, per rank."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields

from torch import fx

from xdit_ir.ir.buffer_ops import Keep, Write
from xdit_ir.ir.flops import is_counted
from xdit_ir.ir.graphs import all_graphs
from xdit_ir.ir.mesh import TIME
from xdit_ir.ir.program import BYTES_IN_FULL, CONSTANT, SPEC, Program, call_parts, is_block_call, qualified
from xdit_ir.pipefusion.pipeline_program import PatchStage, Pipeline
from xdit_ir.sharding.buffer_access import over_time
from xdit_ir.sharding.cost import local_flops, program_flops
from xdit_ir.sharding.fallbacks import find_fallbacks
from xdit_ir.sharding.gathered_weights import GatheredWeights, gathered_weights
from xdit_ir.sharding.machine import H100, Machine
from xdit_ir.sharding.memory import Memory, peaks
from xdit_ir.sharding.regions import block_region, find_idle, find_regions, region_flops, region_names
from xdit_ir.sharding.report import Collective, Report, read_at_calls, traffic

Key = tuple[str, str]


@dataclass
class _RankCost:
    """What one rank has, does (by region) and sends."""

    flops: Counter[str] = field(default_factory=Counter)
    weights: dict[str, int] = field(default_factory=dict)
    buffers: dict[tuple[int, str], int] = field(default_factory=dict)
    full_buffers: dict[tuple[int, str], int] = field(default_factory=dict)
    counts: dict[Key, int] = field(default_factory=dict)
    sent: dict[Key, int] = field(default_factory=dict)

    def send(self, key: Key, count: int, nbytes: int) -> None:
        self.counts[key] = self.counts.get(key, 0) + count
        self.sent[key] = self.sent.get(key, 0) + nbytes


def pipeline_report(original: Program, pipeline: Pipeline, forwards: int = 1, machine: Machine = H100) -> Report:
    """The report of a pipeline, compared with the program that it was made from; `forwards` and `machine` as for
    `make_report`."""
    tally = _Tally(pipeline)
    ranks = [tally.rank(rank) for rank in range(pipeline.mesh.world_size)]
    keys = sorted({key for rank in ranks for key in rank.counts})
    total, flops = program_flops(original, None)[0], [rank.flops.total() for rank in ranks]
    regions = region_flops(pipeline.program, tally.regions, None)
    weights, buffers = [sum(r.weights.values()) for r in ranks], [sum(r.buffers.values()) for r in ranks]
    full = [sum((r.buffers | r.full_buffers).values()) for r in ranks]
    brought = [_brought(pipeline, stage, machine) for stage in range(pipeline.stages)]
    each = [[brought[stage] for stage in pipeline.stages_of(rank)] for rank in range(len(ranks))]
    return Report(
        flops_total=total,
        flops_per_rank=flops,
        weight_bytes_total=sum(spec.nbytes for spec in original.state.values()),
        weight_bytes_per_rank=weights,
        collectives=[
            Collective(*key, max(r.counts.get(key, 0) for r in ranks), max(r.sent.get(key, 0) for r in ranks))
            for key in keys
        ],
        fallbacks=list(find_fallbacks(pipeline.program, pipeline.virtual)),
        buffer_bytes_per_rank=buffers,
        full_buffer_bytes_per_rank=full,
        memory=list(_memory(pipeline, ranks, [max(one.most for one in mine) for mine in each])),
        reads=read_at_calls(original),
        regions=find_regions(regions, {name: [rank.flops[name] for rank in ranks] for name in regions}),
        idle=list(find_idle(flops, forwards / len(ranks), total)),
        forwards=forwards,
        gathered=max(map(_together, each), key=lambda one: (one.seconds, one.total)),
    )


def _brought(pipeline: Pipeline, stage: int, machine: Machine) -> GatheredWeights:
    """What a stage gathers and uploads in a displaced step, in which it computes patch by patch."""
    one, times = gathered_weights(pipeline.cuts[stage].program, machine), pipeline.patches
    seconds = (one.seconds * times, one.exposed * times, one.worked * times)
    return GatheredWeights(one.total * times, one.most, one.uploaded * times, *seconds)


def _together(stages: Sequence[GatheredWeights]) -> GatheredWeights:
    """Of the stages of a rank, which computes one at a time."""
    totals = {field.name: sum(getattr(one, field.name) for one in stages) for field in fields(GatheredWeights)}
    return GatheredWeights(**totals | {"most": max(one.most for one in stages)})


def _memory(pipeline: Pipeline, ranks: Sequence[_RankCost], brought: Sequence[int]) -> Iterator[Memory]:
    """That of each rank, by the largest patch of what all stages do, one of which it does; `brought`: bytes of weights
    that it gathers or uploads for the moment."""
    virtual, stored = pipeline.virtual, pipeline.program.stored
    found = peaks(pipeline.program, virtual)
    for rank, (cost, most) in enumerate(zip(ranks, brought, strict=True)):
        host = sum(size for name, size in cost.weights.items() if name in stored and stored[name].on_host)
        here, buffers = sum(cost.weights.values()) - host + most, sum(cost.buffers.values())
        places = virtual.group(pipeline.virtual_rank(rank, 0), (TIME,))
        each = (found.activations, found.exchanges, found.recordings)
        activations, exchanges, recordings = (max(one[place] for place in places) for one in each)
        yield Memory(here, activations, exchanges, buffers, recordings, host)


class _Tally:
    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.layouts = {
            name: {node.name: node for node in graph.nodes} for name, graph, _ in all_graphs(pipeline.program)
        }
        self.costs: dict[tuple[str, str], list[int]] = {}
        self.sent: dict[fx.Node, tuple[Key, tuple[int, ...]] | None] = {}
        self.regions = region_names(pipeline.program)

    def rank(self, rank: int) -> _RankCost:
        result = _RankCost()
        for stage, patch in itertools.product(self.pipeline.stages_of(rank), range(self.pipeline.patches)):
            virtual = self.pipeline.virtual_rank(rank, patch)
            part = self.pipeline.part(stage, virtual)
            if part.sends:
                result.send(("send", TIME), 1, sum(spec.nbytes for spec in part.message(sent=True)))
            for name, prefix, node in _nodes(part):
                self._count(result, stage, (name, prefix), node, virtual)
        return result

    def _count(self, result: _RankCost, stage: int, place: tuple[str, str], node: fx.Node, virtual: int) -> None:
        name, prefix = place
        if node.op == "get_attr":
            weight = str(node.target)
            if not weight.startswith(CONSTANT + "."):
                result.weights[weight] = node.meta[SPEC].nbytes
        elif isinstance(node.target, Write):
            slot, count = (stage, qualified(prefix, node.target.slot)), math.prod(node.target.shape)
            result.buffers[slot] = count * node.meta[SPEC].dtype.itemsize
            full = self.layouts[name][node.target.slot].meta.get(BYTES_IN_FULL)
            if full is not None:
                result.full_buffers[slot] = count * full
        elif isinstance(node.target, Keep):
            result.buffers[stage, qualified(prefix, f"{node.target.slot}_keep")] = node.meta[SPEC].nbytes
        source = self.layouts[name].get(node.name)
        if source is None or node.op != "call_function":
            return
        if is_counted(source):
            key = (name, node.name)
            if key not in self.costs:
                self.costs[key] = local_flops(source, self.pipeline.virtual)
            region = block_region(name) if name else self.regions[source]
            result.flops[region] += self.costs[key][virtual]
        if source not in self.sent:
            virtually = self.pipeline.virtual
            self.sent[source] = None if over_time(source, virtually) else traffic(source, virtually)
        found = self.sent[source]
        if found is not None:
            result.send(found[0], 1, found[1][virtual])


def _nodes(part: PatchStage) -> Iterator[tuple[str, str, fx.Node]]:
    """Every node that a part runs: the block's name and prefix (empty: outer graph), and the node."""
    for node in part.program.graph.nodes:
        yield "", "", node
        if is_block_call(node):
            name, prefix, *_ = call_parts(node)
            yield from ((name, prefix, inner) for inner in part.program.blocks[name].graph.nodes)
