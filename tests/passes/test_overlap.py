"""A block whose attention runs beside an MLP: what is exchanged, in which form, and what is done meanwhile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import xdit_ir as xir
from xdit_ir.ir import ops
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.printer import body_text
from xdit_ir.ir.program import Program
from xdit_ir.passes.base import run_passes
from xdit_ir.passes.canonicalize import Canonicalize
from xdit_ir.passes.find_tokens import FindTokens
from xdit_ir.passes.lower_attention import LowerAttention
from xdit_ir.passes.order import token_passes
from xdit_ir.passes.order_exchanges import OrderExchanges
from xdit_ir.passes.overlap import Overlap
from xdit_ir.passes.split_joins import SplitJoins
from xdit_ir.passes.split_statistics import SplitStatistics
from xdit_ir.sharding.machine import Machine

Golden = Callable[[str, str], None]
MESH = Mesh.of(ulysses=2)
SLOW = Machine(flops=5e9, bytes=2e9, memory=1.5e10, latency=1e-7)  # as slow as the model is small


class Parallel(nn.Module):
    """Attention and MLP side by side, joined by one projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.mlp, self.norm = nn.Linear(width, 4 * width), nn.RMSNorm(width // heads)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(5 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.gelu(self.mlp(x), approximate="tanh")
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)) for f in (self.q, self.k, self.v))
        q, k, v = self.norm(q).transpose(1, 2), self.norm(k).transpose(1, 2), v.transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(torch.cat([mixed, hidden], -1))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Parallel(8, 2) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture(scope="module")
def lowered() -> Program:
    traced = xir.trace(Model(), (torch.zeros(2, 64, 8),)).ir
    return run_passes(
        traced, [Canonicalize(), FindTokens(), *token_passes(MESH), LowerAttention(MESH), SplitStatistics()]
    )


def position(graph: fx.Graph, find: Callable[[fx.Node], bool]) -> list[int]:
    return [place for place, node in enumerate(graph.nodes) if find(node)]


def test_order_exchanges(lowered: Program) -> None:
    turned = run_passes(lowered, [OrderExchanges()])
    assert "permute(%all_to_all" not in body_text(turned, "Parallel")


def test_overlap(lowered: Program, golden: Golden) -> None:
    scheduled = run_passes(lowered, [OrderExchanges(), SplitJoins(), Overlap(MESH, SLOW)])
    golden("overlap", body_text(scheduled, "Parallel"))
    graph = scheduled.blocks["Parallel"].graph
    exchanges = position(graph, lambda node: node.target is ops.all_to_all)
    (attention,) = position(graph, lambda node: node.target is ops.attention)
    products = position(graph, lambda node: node.target is torch.ops.aten.linear.default)
    assert exchanges[2] < attention < exchanges[3]
    assert any(exchanges[2] < place < attention for place in products), "work under the exchange of q, k and v"
    assert any(exchanges[3] < place for place in products[:-1]), "work under the exchange of the result"


def test_every_degree_still_computes_the_model() -> None:
    torch.manual_seed(0)
    model, example = Model(), (torch.randn(2, 62, 8),)
    for degrees in ({"ulysses": 2}, {"ulysses": 2, "ring": 2}, {"ring": 3}, {"cfg": 2, "ulysses": 2}):
        assert xir.check(model, example, **degrees).ok
