"""What `tensor` divides, what it leaves whole and says so, and what is refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import xdit_ir as xir
from xdit_ir.api import ParallelProgram
from xdit_ir.ir.graphs import placeholders, results_of
from xdit_ir.ir.program import LAYOUT, SPEC, TensorSpec
from xdit_ir.passes.surroundings import LONGEST, surroundings


class Attention(nn.Module):
    """Fused projections of grouped heads, with norms over all heads of the queries, and a gated MLP."""

    def __init__(self, width: int = 24, heads: int = 4, keys: int = 2) -> None:
        super().__init__()
        self.heads, self.keys, self.size = heads, keys, width // heads
        self.qkv = nn.Linear(width, (heads + 2 * keys) * self.size)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads, keys, size = self.heads, self.keys, self.size
        q, k, v = self.qkv(x).split([heads * size, keys * size, keys * size], -1)
        q = self.norm(q).unflatten(-1, (heads, size)).transpose(1, 2)
        k, v = (one.unflatten(-1, (keys, size)).transpose(1, 2) for one in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        gate, value = self.up(x).chunk(2, -1)
        return x + self.down(F.silu(gate) * value)


class Mixing(nn.Module):
    """Nothing of it is a feature: tokens are mixed by a table that it makes of itself."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.softmax(x * self.scale, 1).cumsum(1)


class Stack(nn.Module):
    def __init__(self, kind: type[nn.Module], **sizes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind(**sizes) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


X = torch.randn(2, 10, 24, generator=torch.Generator().manual_seed(0))


def divided(model: nn.Module, error: float = 1e-5, **degrees: int) -> ParallelProgram:
    """Divided, and every rank gives what the model does."""
    parallel = xir.trace(model, (X,)).parallelize(**degrees)
    for output in parallel.simulate(model, (X,)):
        torch.testing.assert_close(output, model(X), rtol=10 * error, atol=error)
    return parallel


@pytest.mark.parametrize(
    ("sizes", "degrees"),
    [
        ({"heads": 4, "keys": 2}, {"tensor": 2}),
        ({"heads": 4, "keys": 2}, {"tensor": 4}),  # two ranks share a head of keys
        ({"heads": 4, "keys": 4}, {"tensor": 3}),  # one rank has two heads
        ({"heads": 4, "keys": 4}, {"tensor": 2, "ulysses": 2}),
        ({"heads": 4, "keys": 2}, {"tensor": 2, "ulysses": 2}),  # too few heads of keys for both
        ({"heads": 4, "keys": 4}, {"tensor": 2, "ring": 2}),
        ({"heads": 4, "keys": 4}, {"tensor": 2, "cfg": 2}),
    ],
)
def test_heads_and_features_are_divided(sizes: dict[str, int], degrees: dict[str, int]) -> None:
    torch.manual_seed(0)
    parallel = divided(Stack(Attention, **sizes).eval(), **degrees)
    fair = -(-4 // degrees["tensor"]) / 4
    assert parallel.report().weight_share <= fair + 0.15
    assert parallel.report().fallbacks == []


def test_each_rank_holds_its_rows_and_columns_only() -> None:
    torch.manual_seed(0)
    parallel = divided(Stack(Attention, keys=4).eval(), tensor=2)
    first, held = (
        {str(node.target): node.meta[SPEC].shape for node in parallel.rank(rank).graph.find_nodes(op="get_attr")}
        for rank in range(2)
    )
    assert held["_stored.layers.0.qkv.weight"] == (36, 24)
    assert held["_stored.layers.0.out.weight"] == (24, 12)
    assert first["layers.0.out.bias"] == (24,) and "layers.0.out.bias" not in held, "what is added to a sum once"


def test_a_block_without_features_stays_whole() -> None:
    torch.manual_seed(0)
    parallel = divided(Stack(Mixing).eval(), tensor=2)
    assert all(node.meta[LAYOUT].is_whole for node in parallel.ir.graph.find_nodes(op="get_attr"))
    assert parallel.report().weight_share == 1.0


def test_it_is_checked_and_said() -> None:
    torch.manual_seed(0)
    model = Stack(Attention, keys=4).eval()
    assert xir.check(model, (X,), tensor=2).ok
    report = divided(model, tensor=2).report()
    assert {one.mesh_dim for one in report.collectives} == {"tensor"}
    assert "MiB a rank of" in str(report)


def test_what_cannot_be_is_refused() -> None:
    model = Stack(Attention)
    traced = xir.trace(model, (X,))
    with pytest.raises(xir.ParallelizeError, match=r"tensor=2 with pipefusion=2.*nearest legal: tensor=2"):
        traced.parallelize(tensor=2, pipefusion=2)
    with pytest.raises(xir.ParallelizeError, match=r"tensor=100000 divides features, of which there are 96 at most"):
        traced.parallelize(tensor=100000)


class Encoded(nn.Module):
    """A stack between layers that are like no other, and are no blocks."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.first, self.layers, self.last = Attention(width), Stack(Attention), Attention(width, 3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers(self.first(x) + 1)
        return self.last(torch.relu(x))


@pytest.mark.parametrize("degrees", [{"tensor": 2}, {"tensor": 2, "ulysses": 2}, {"tensor": 3}])
def test_what_stands_around_the_blocks_is_divided(degrees: dict[str, int]) -> None:
    torch.manual_seed(0)
    parallel = divided(Encoded().eval(), **degrees)
    fair = -(-4 // degrees["tensor"]) / 4
    assert parallel.report().weight_share <= fair + 0.15
    made = (layout for call in parallel.ir.calls for layout in call.meta[LAYOUT])
    assert all("tensor" not in layout.dividing_dims(parallel.ir.mesh) for layout in made)


def test_other_inputs_make_no_other_choice() -> None:
    """What a program for other inputs needs is there, where the model has given its weights up."""
    few, many = (xir.trace(Encoded().eval(), (torch.randn(2, tokens, 24),)) for tokens in (4, 400))
    assert few.parallelize(tensor=2).ir.stored == many.parallelize(tensor=2).ir.stored


class Tied(Encoded):
    """One layer's weights are used outside of it too, and cut in another way there."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.layers.layers[0]
        return super().forward(x) @ layer.up.weight.T @ layer.up.weight


def test_a_weight_that_is_cut_in_two_ways_is_stored_in_two() -> None:
    torch.manual_seed(0)
    parallel = divided(Tied().eval(), tensor=2)
    name = "_stored.layers.layers.0.up.weight"
    held = [node for node in parallel.ir.graph.find_nodes(op="get_attr") if str(node.target).startswith(name)]
    assert len({node.target for node in held}) == len({node.meta[LAYOUT] for node in held}) == 2


class Scaled(nn.Module):
    """Weights are scaled before they are used; heads of the second half go on without a product behind them."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(size)) for size in ((4 * width, width), (width, 4 * width)))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (one.unflatten(-1, (4, -1)).transpose(1, 2) for one in self.qkv(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + torch.cat([self.out(mixed[:, :5]), mixed[:, 5:]], 1)
        return x + F.linear(F.gelu(F.linear(x, self.up * 0.1)), self.down * 0.1)


class Labelled(nn.Module):
    """Every layer has a table of its own."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(500, width), Attention(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix(x + self.table(x[:, 0, :2].abs().sum(-1).long()).unsqueeze(1))


class Grouped(nn.Module):
    """Experts, each of which gets the tokens whose score is best for it, in grouped products."""

    def __init__(self, width: int = 24, experts: int = 4) -> None:
        super().__init__()
        self.score, self.experts = nn.Linear(width, experts), experts
        self.up = nn.Parameter(0.1 * torch.randn(experts, 2 * width, width))
        self.down = nn.Parameter(0.1 * torch.randn(experts, width, 2 * width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, 1)
        weight, chosen = self.score(rows).softmax(-1).max(-1)
        order = chosen.argsort(stable=True)
        ends = F.one_hot(chosen, self.experts).sum(0).cumsum(0).int()
        up, down = (one.bfloat16().transpose(-2, -1) for one in (self.up, self.down))
        made = F.silu(torch._grouped_mm(rows[order].bfloat16(), up, offs=ends))
        made = torch._grouped_mm(made, down, offs=ends).float()
        return x + (made[order.argsort()] * weight.unsqueeze(-1)).view_as(x)


class Batched(Grouped):
    """The same of all tokens, in products with a dim of experts."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, 1)
        made = F.silu(torch.bmm(rows.expand(self.experts, -1, -1), self.up.transpose(1, 2)))
        made = torch.bmm(made, self.down.transpose(1, 2)) * self.score(rows).softmax(-1).T.unsqueeze(-1)
        return x + made.sum(0).view_as(x)


class Unpacked(nn.Module):
    """Two numbers of 4 bits in each byte, which are shifted by constants that forward makes."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        for name, size in {"up": (4 * width, width // 2), "down": (width, 2 * width)}.items():
            self.register_buffer(name, torch.randint(0, 256, size, dtype=torch.uint8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shifts = 4 * torch.arange(2, dtype=torch.uint8)
        up, down = (0.02 * ((w.unsqueeze(-1) >> shifts & 15).flatten(1).float() - 8) for w in (self.up, self.down))
        return x + F.linear(F.gelu(F.linear(x, up)), down)


class Made(Attention):
    """One product is with a weight that is made of the input, and adds a bias of the model."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        return x + F.linear(x, x[0, :8].softmax(-1).t() @ x[1, :8].softmax(-1), self.out.bias)


@pytest.mark.parametrize("kind", [Scaled, Labelled, Grouped, Batched, Unpacked])
def test_weights_that_are_scaled_tables_and_experts_are_divided(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    report = divided(Stack(kind).eval(), 1e-2 if kind is Grouped else 1e-5, tensor=2).report()  # bf16
    assert report.weight_share <= 0.53 and report.share <= 0.52


def test_a_product_with_what_is_no_weight_stays_whole() -> None:
    """Whatever the bias is that it adds."""
    torch.manual_seed(0)
    assert divided(Stack(Made).eval(), tensor=2).report().weight_share <= 0.53


class Unrolled(nn.Module):
    """Layers in one module, so that there are no blocks."""

    def __init__(self, layers: int = 130) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(48, 24) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for weight in self.weights:
            x = x + F.gelu(x @ weight.T) @ weight
        return x


def test_long_surroundings_are_cut_between_layers() -> None:
    program = xir.trace(Unrolled(), (X,)).ir
    pieces = [block.graph for block in surroundings(program, "around")]
    nodes = [[node.name for node in graph.nodes if node.op == "call_function"] for graph in pieces]
    assert list(itertools.chain(*nodes)) == [node.name for node in program.graph.nodes if node.op == "call_function"]
    assert len(pieces) > 1 and max(map(len, nodes)) <= LONGEST
    assert all(len(results_of(graph)) == len(placeholders(graph)) == 1 for graph in pieces)


class Rows(nn.Module):
    """A loop over rows: many results of one operator, with others in between."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = torch.zeros_like(x[:, 0])
        for place in range(x.shape[1]):
            state = state * 0.5 + x[:, place] * place
        return self.down(F.relu(self.up(x + state[:, None])))


def test_the_results_of_one_operator_stay_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xdit_ir.passes.surroundings.LONGEST", 8)
    model, example = Rows(), (torch.randn(1, 10, 8),)
    traced = xir.trace(model, example)
    results = [results_of(block.graph) for block in surroundings(traced.ir, "around")]
    assert len(results) > 1 and all(isinstance(one.meta[SPEC], TensorSpec) for many in results for one in many)
    assert xir.check(model, example, traced=traced, tensor=2).ok
