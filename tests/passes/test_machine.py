"""The machine is a value: choices are priced with the speeds that are given, wherever a pass makes one."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import xdit_ir as xir
from xdit_ir import Machine
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.program import SPEC, STAGE
from xdit_ir.passes.base import run_passes
from xdit_ir.passes.contract import Pass
from xdit_ir.passes.partition_stages import PartitionStages
from xdit_ir.passes.registry import parse_passes
from xdit_ir.passes.shard_tokens import ShardTokens
from xdit_ir.planning.hardware import hardware_of, load, names
from xdit_ir.planning.schedule import timeline
from xdit_ir.sharding.speeds import Kernels, Link, Links

FAST, SLOW = Machine(bytes=1e18, latency=0.0), Machine(bytes=1e6)
TOKENS = {"x": torch.zeros(1, 16, 24)}


class Attention(nn.Module):
    """Six heads, which four ranks cannot share evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(24, 72)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 6, 4)).permute(2, 0, 3, 1, 4)
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Layers(nn.Module):
    """Two layers that have all the weights, then two of as many FLOPs that have none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x).relu()).relu()
        for _ in range(2):
            x = (x @ torch.ones(24, 24)).relu()
        return x


def test_a_slow_link_makes_ulysses_of_gathered_keys() -> None:
    """Uneven heads cost FLOPs of the slowest rank, whole heads over gathered keys cost bytes."""
    traced = xir.trace(Attention(), TOKENS)
    kinds = {
        machine: {one.kind for one in traced.parallelize(ulysses=4, machine=machine).report().collectives}
        for machine in (FAST, SLOW)
    }
    assert "all_to_all" not in kinds[FAST] and "all_to_all" in kinds[SLOW]


def test_a_slow_link_keeps_stages_contiguous() -> None:
    """Folded stages spread the weights, but send three times."""
    program = xir.trace(Layers(), TOKENS).ir
    assert PartitionStages(2, machine=FAST).apply(program).coordinates == (0, 1, 1, 0)
    assert PartitionStages(2, machine=SLOW).apply(program).coordinates == (0, 1)


@pytest.mark.parametrize(
    ("degrees", "priced"),
    [
        (
            {"ulysses": 2},
            {
                *("split-batch", "share-branches", "shard-tokens", "shard-features", "replicate-shared"),
                *("lower-attention", "tile-attention", "merge-halos", "divide-conditions", "overlap"),
            },
        ),
        ({"pipefusion": 2}, {"partition-stages", "split-batch", "displace-patches", "lower-attention"}),
        (
            {"pipefusion": 2, "patches": 1, "ulysses": 2},
            {"partition-stages", "split-batch", "shard-tokens", "replicate-shared", "lower-attention"},
        ),
    ],
)
def test_every_pass_that_prices_gets_the_machine(degrees: dict[str, int], priced: set[str]) -> None:
    passes: list[Pass] = []
    traced = xir.trace(nn.Sequential(Attention(), Attention()), {"input": TOKENS["x"]})
    parallel = traced.parallelize(**degrees, machine=SLOW, after=lambda one, _: passes.append(one))
    assert {one.name for one in passes if getattr(one, "machine", None) == SLOW} == priced
    assert {one.name for one in passes if hasattr(one, "machine")} == priced
    assert parallel.machine == SLOW, "schedules are worked out for it"
    assert timeline(parallel).total > timeline(parallel, FAST).total


KERNELS = Kernels(products=1e15, single=1e15, attention=1e15, flash=1e15, memory=1e15, fused=1e15)


def known(*links: Link, **figures: float) -> Machine:
    """One of which more is known than averages."""
    return Machine(kernels=dataclasses.replace(KERNELS, **figures), links=Links(links))


@pytest.mark.parametrize(("near", "turned"), [(4, False), (2, True)])
def test_what_an_exchange_costs_depends_on_where_ranks_are(near: int, turned: bool) -> None:
    """Four ranks cannot share six heads evenly: within a node, keys are gathered; between slow nodes, heads turned."""
    machine = known(Link(near, 1e18, 0.0), Link(1024, 1e6, 0.0))
    found = xir.trace(Attention(), TOKENS).parallelize(ulysses=4, machine=machine).report().collectives
    assert ("all_to_all" in {one.kind for one in found}) == turned


class TwoStreams(nn.Module):
    """Two texts that never meet: one of many FLOPs in products, one of a long attention."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(24, 960), nn.Linear(960, 24)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = F.scaled_dot_product_attention(x, x, x)
        return self.narrow(self.wide(x).relu()), F.scaled_dot_product_attention(y, y, y)


def test_the_stream_that_takes_the_most_time_is_divided_first() -> None:
    texts = {name: torch.zeros(1, 1, size, 24, dtype=torch.bfloat16) for name, size in (("x", 16), ("y", 64))}
    traced = xir.trace(TwoStreams().to(torch.bfloat16), texts)
    assert [axis.value for axis in traced.analysed.tokens if not axis.is_context] == ["x", "y"]
    firsts = []
    for machine in (Machine(), known(Link(8, 1e12, 0.0)), known(Link(8, 1e12, 0.0), attention=1e6)):
        seeding = run_passes(traced.analysed, [ShardTokens(Mesh.of(ulysses=2), machine)]).seeding
        assert seeding is not None
        firsts.append(next(iter(seeding.seeds)))
    assert firsts == ["x", "x", "y"]


@pytest.mark.parametrize("ring", [2, 3])
def test_each_hop_of_a_ring_begins_anew(ring: int) -> None:
    """A second before the first byte arrives: of each hop, and of the gather of the result."""
    parallel = xir.trace(Attention(), TOKENS).parallelize(ring=ring, machine=known(Link(1024, 1e18, 1.0)))
    assert timeline(parallel).total == pytest.approx(ring * 1e6, rel=1e-3)


def test_stages_are_even_in_time_rather_than_in_flops() -> None:
    """Nearly all FLOPs are of the last two products; where every kernel takes as long, both halves have two of them."""
    model = nn.Sequential(Attention(), nn.Linear(24, 960, bias=False), nn.Linear(960, 24, bias=False))
    program, link = xir.trace(model, {"input": TOKENS["x"]}).ir, Link(8, 1e3, 0.0)  # too slow to be passed often
    ends = []
    for machine in (known(link), known(link, gap=1.0)):
        made = PartitionStages(2, machine=machine).apply(program)
        (*_, last) = (node for node in made.graph.nodes if node.meta.get(STAGE) == 0)
        ends.append(last.meta[SPEC].shape[-1])
        assert made.coordinates == (0, 1)
    assert ends == [960, 24]


@pytest.mark.parametrize("name", names())
def test_what_is_known_of_a_machine_goes_from_rank_to_rank(name: str) -> None:
    prices = load(name).prices
    assert Machine.of(json.loads(json.dumps(dataclasses.asdict(prices)))) == prices
    assert load(name).kernels == hardware_of(prices).kernels and load(name).links == hardware_of(prices).links


def test_port_hands_it_on() -> None:
    ported = xir.port(Attention(), machine=SLOW)
    ported(**TOKENS)
    assert ported.program is not None and ported.program.machine == SLOW


def test_without_one_it_is_the_default() -> None:
    assert xir.trace(Attention(), TOKENS).parallelize().machine == Machine()


@pytest.mark.parametrize(
    ("speeds", "said"),
    [
        ({"bytes": 0}, "Machine(bytes=0): expected a positive number, such as 2e+11"),
        ({"flops": -1.0}, "Machine(flops=-1.0)"),
        ({"memory": math.nan}, "Machine(memory=nan)"),
        ({"latency": -1e-6}, "Machine(latency=-1e-06)"),
        ({"flops": "fast"}, "Machine(flops='fast')"),
    ],
)
def test_what_is_no_speed(speeds: dict[str, Any], said: str) -> None:
    with pytest.raises(xir.ParallelizeError, match=re.escape(said)):
        Machine(**speeds)


def test_what_is_no_machine() -> None:
    for call in (xir.trace(Attention(), TOKENS).parallelize, lambda **given: xir.port(Attention(), **given)):
        with pytest.raises(xir.ParallelizeError, match=r"machine='h100' is no xdit_ir\.Machine, such as"):
            call(machine="h100")


def test_as_text() -> None:
    assert Machine.parse("bytes=25e9, latency=30e-6") == Machine(bytes=25e9, latency=30e-6)
    assert str(Machine()) == "500 TFLOP/s, 1500 GB/s of memory, 200 GB/s to other ranks after 15 µs"
    for text in ("speed=2", "bytes", "bytes=fast", ""):
        with pytest.raises(xir.ParallelizeError, match="expected flops, bytes, memory, latency, upload with a number"):
            Machine.parse(text)


def test_a_list_of_passes_keeps_the_speeds_of_the_pass_before() -> None:
    first, second = parse_passes("lower-attention{ulysses=2 bytes=25e9},overlap{latency=1e-6}")
    made: Any = first.make()
    then: Any = second.make(made.mesh, made.machine)
    assert then.machine == Machine(bytes=25e9, latency=1e-6) and then.mesh == made.mesh
