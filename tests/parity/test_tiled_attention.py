"""Attention in tiles (Attention2D): where links are slow, queries are gathered along one factor of the ranks that share
keys and keys along the other; exact, and chosen only where it takes less time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import xdit_ir as xir
from xdit_ir.ir import ops
from xdit_ir.ir.graphs import all_graphs
from xdit_ir.ir.partial_attention import attention_with_lse, merge_partials, partial_attention
from xdit_ir.ir.program import Program
from xdit_ir.passes.base import run_passes
from xdit_ir.passes.registry import parse_passes
from xdit_ir.planning.hardware import load
from xdit_ir.sharding.cost import partners
from xdit_ir.sharding.specialize import Specialize
from xdit_ir.text import difference, parse, write

SLOW = xir.Machine(bytes=1e6, latency=0.0)


class SelfAttention(nn.Module):
    """Four heads of queries, of which several may share one of `keys`, and a mask: per key (`keys`), a boolean one
    (`square`), or a `bias`, of queries and keys."""

    def __init__(self, tokens: int, keys: int, mask: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.keys = keys
        self.q, self.kv, self.out = nn.Linear(32, 32), nn.Linear(32, 16 * keys), nn.Linear(32, 32)
        square = torch.randn(1, 4, tokens, tokens)
        known = {"keys": (torch.arange(tokens) % 5 > 0).view(1, 1, 1, -1), "square": square > 0, "bias": square}
        self.register_buffer("mask", known.get(mask))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(x).unflatten(-1, (4, 8)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, self.keys, 8)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, self.mask, enable_gqa=True)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


def targets(program: Program) -> set[Any]:
    return {node.target for _, graph, _ in all_graphs(program) for node in graph.nodes}


@pytest.mark.parametrize(
    ("degrees", "tokens", "keys", "mask"),
    [
        ({"ring": 4}, 32, 4, ""),
        ({"ring": 4}, 30, 4, "square"),
        ({"ring": 6}, 31, 2, "bias"),
        ({"ring": 6}, 5, 4, ""),
        ({"ring": 4, "ulysses": 2}, 31, 4, "keys"),
        ({"ulysses": 8}, 33, 2, ""),
        ({"ring": 2, "ulysses": 8}, 33, 4, "bias"),
        ({"cfg": 2, "ring": 9}, 40, 2, ""),
        ({"ring": 4, "tensor": 2}, 31, 4, "keys"),
    ],
    ids=str,
)
def test_every_rank_computes_what_one_device_does(degrees: dict[str, int], tokens: int, keys: int, mask: str) -> None:
    model, example = SelfAttention(tokens, keys, mask), (torch.randn(2, tokens, 32),)
    traced = xir.trace(model, example)
    result = xir.check(model, example, traced=traced, machine=SLOW, **degrees)
    assert result.ok, str(result)
    found = targets(traced.parallelize(machine=SLOW, **degrees).ir)
    assert partial_attention in found or tokens < 6, "fewer keys than rows of a grid: no tiles"


def test_the_report_has_the_exchanges() -> None:
    """Of a grid of two by two: one part of queries, of keys and of values come, a part of results leaves."""
    parallel = xir.trace(SelfAttention(32, 4), (torch.zeros(2, 32, 32),)).parallelize(ring=4, machine=SLOW)
    report = parallel.report()
    sent = {one.kind: (one.count, one.bytes_per_rank) for one in report.collectives}
    part = 2 * 8 * 8 * 4  # batch, tokens, head size, bytes
    assert sent["halo_exchange"] == (3, part * (4 + 4 + 4))
    assert sent["all_to_all"] == (1, part * 4 // 8 * (8 + 1)), "results, and a log-sum-exp for each row"
    assert report.share == 0.25 and not report.fallbacks
    halos = [
        node for _, graph, _ in all_graphs(parallel.ir) for node in graph.nodes if node.target is ops.halo_exchange
    ]
    found = sorted(partners(node, parallel.mesh)[0] for node in halos)
    assert found == [(0, 1), (0, 1), (0, 2)], "keys and values from its row, queries from its column"


def test_the_program_of_a_rank_survives_the_text() -> None:
    program = xir.trace(SelfAttention(31, 2, "bias"), (torch.zeros(2, 31, 32),)).parallelize(ring=6, machine=SLOW).ir
    for one in (program, Specialize(4).apply(program)):
        document = write(one)
        assert difference(one, parse(document.text, document.attachments)) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_parts_merge_to_the_whole(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, count, 16, dtype=dtype) for count in (6, 24, 24))
    mask = torch.ones(6, 24, dtype=torch.bool)
    mask[2, :16], mask[3] = False, False  # a row without keys in two parts, one without any
    parts = partial_attention(30 * q, k, v, mask, parts=[((0, 7),), ((7, 9),), ((16, 8),), ()])
    merged = merge_partials(parts, 4)
    whole, lse = attention_with_lse(30 * q, k, v, mask, None)
    assert merged.dtype == dtype and not merged[:, :, 3].any() and lse.max() > 80
    bound = {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(dtype, 1e-5)
    torch.testing.assert_close(merged.to(whole.dtype), whole, rtol=bound, atol=bound)


@pytest.mark.parametrize(
    ("tokens", "heads", "degrees", "machine", "tiled"),
    [
        (4608, 48, "ring=8 ulysses=8", "h100-infiniband", True),
        (4608, 48, "ring=9 ulysses=8", "h100-infiniband", True),
        (4608, 48, "ring=4 ulysses=8", "h100-infiniband", True),
        (4608, 48, "ulysses=64", "h100-infiniband", True),  # instead of gathered keys
        (75600, 40, "ring=4 ulysses=8", "h100-infiniband", False),  # keys travel under the work
        (4608, 48, "ring=4 ulysses=2", "h100", False),
        (75600, 40, "ring=8", "h100", False),
    ],
)
def test_tiles_are_chosen_where_a_ring_does_not_hide_its_exchanges(
    tokens: int, heads: int, degrees: str, machine: str, tiled: bool
) -> None:
    """FLUX.2's and Wan's sizes; between nodes, and inside of one."""
    x = f"bf16[1, {heads}, {tokens}, 128]"
    text = f"program P {{\n input %x: {x}\n %k: {x} = mul.Tensor(%x, 2.0)\n %v: {x} = mul.Tensor(%x, 3.0)\n"
    text += f" %y: {x} = attention(%x, %k, %v)\n return %y\n}}\nfacts canonical\n"
    passes = parse_passes(f"find-tokens,shard-tokens{{{degrees}}},propagate-layouts,lower-attention,tile-attention")
    program, prices = parse(text), load(machine).prices
    for step in passes:
        mesh = program.seeding.mesh if program.seeding is not None else program.mesh
        program = run_passes(program, [step.make(mesh, prices)])
    found = targets(program)
    assert (partial_attention in found) == tiled
    assert (ops.ring_attention in found) == (not tiled)
