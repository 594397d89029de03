"""The fallback ladder: what cannot be captured becomes a leaf, divided where a probe says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import xdit_ir as xir
from xdit_ir.capture import trace
from xdit_ir.errors import TraceError
from xdit_ir.ir.leaf import Leaf
from xdit_ir.ir.program import Program

Run = Callable[..., Any]


class Experts(nn.Module):
    """Routes every token to the expert of its greatest score, one expert at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 3)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, 1)
        chosen = self.gate(flat).argmax(-1)
        out = torch.zeros_like(flat)
        for index in chosen.unique().tolist():
            out[chosen == index] = self.experts[index](flat[chosen == index])
        return out.view_as(x)


class Normalised(nn.Module):
    """Branches on values and mixes all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x) - x.mean(1, keepdim=True)
        return y * 2 if y.abs().max().item() > 1 else y


class Groups(nn.Module):
    """Scales rows by the number of their group among those that there are: all samples decide."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        signs = (x[..., 0] > 0).long() + 2 * (x[..., 1] > 0).long()
        groups, which = torch.unique(signs, return_inverse=True)
        out = torch.zeros_like(x)
        for number in range(len(groups)):
            out[which == number] = self.linear(x[which == number]) * (number + 1)
        return out


class Largest(nn.Module):
    """Works on the largest sample only: all tokens decide which that is."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        place, out = int(x.norm(dim=(1, 2)).argmax()), x.clone()
        out[place] = self.linear(x[place])
        return out


class AnyLate(Largest):
    """Branches on what any sample's step is, beside values that cannot be known."""

    def forward(self, x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        out = self.linear(x)
        out = out * (2 if (step < 500).any() else 1)
        return out * 2 if x.isnan().any().item() else out


class Decided(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.embed, self.kind = nn.Linear(16, 16), kind()

    def forward(self, x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        return self.kind(self.embed(x).sin(), step) + x


class Kept(nn.Module):
    """Its result has as many rows as values are positive."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[x.sum(-1) > 0]


class Owner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.kept = nn.Linear(16, 16), Kept()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.kept(x).mean(0)


class Layer(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.norm, self.qkv, self.rest = nn.LayerNorm(16), nn.Linear(16, 48), kind()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.rest(x)


class Model(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(kind) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def leaves(program: Program) -> list[Leaf]:
    graphs = [program.graph, *(block.graph for block in program.blocks.values())]
    return [node.target for graph in graphs for node in graph.nodes if isinstance(node.target, Leaf)]


@pytest.mark.parametrize("kind", [Experts, Normalised, Owner, Groups])
def test_found_by_itself(kind: type[nn.Module], run: Run, same: Run) -> None:
    model = Model(kind).eval()
    program = trace(model, (torch.randn(2, 12, 16),))
    assert len(program.blocks) == 1
    (leaf,) = leaves(program)
    assert isinstance(leaf.module, kind)
    assert [dim for dim, _ in leaf.aligned] == ([0, 1] if kind is Experts else [])
    for scale in (0.1, 1.0, 10.0):
        x = torch.randn(2, 12, 16) * scale
        with torch.no_grad():
            same(run(program, model, x), model(x))


@pytest.mark.parametrize("kind", [Largest, AnyLate])
def test_what_all_decide_is_not_divided(kind: type[nn.Module]) -> None:
    (leaf,) = leaves(trace(Decided(kind).eval(), (torch.randn(2, 12, 16), torch.tensor([750, 750]))))
    assert isinstance(leaf.module, kind)
    assert leaf.aligned == {Largest: (), AnyLate: ((0, (0,)), (1, (0,)))}[kind]  # each rank has all steps


@pytest.mark.parametrize(("kind", "whole"), [(Experts, False), (Normalised, True), (Groups, True)])
def test_divided_where_local(kind: type[nn.Module], *, whole: bool) -> None:
    model, example = Model(kind).eval(), (torch.randn(2, 12, 16),)
    for degrees in ({"ulysses": 2}, {"ulysses": 3}, {"cfg": 2}):
        parallel = xir.trace(model, example).parallelize(**degrees)
        result = xir.check(model, example, **degrees)
        assert result.ok, str(result)
        (listed,) = [item for item in parallel.report().fallbacks if "opaque leaf" in item.reason]
        assert kind.__name__ in listed.op
        if "ulysses" in degrees:
            assert (listed.bytes > 0) == whole


def test_named(run: Run, same: Run) -> None:
    model, x = Model(Experts).eval(), torch.randn(2, 12, 16)
    for wanted in ("layers.0.qkv", "Linear", nn.LayerNorm, model.layers[1].qkv):
        program = trace(model, (x,), leaf=[wanted])
        assert len(leaves(program)) > 1
        with torch.no_grad():
            same(run(program, model, x * 2), model(x * 2))
    with pytest.raises(TraceError, match="no submodule 'nothing'"):
        trace(model, (x,), leaf=["nothing"])


def test_from_meta(run: Run, same: Run) -> None:
    with torch.device("meta"):
        hollow = Model(Experts).eval()
    program = trace(hollow, (torch.empty(2, 12, 16, device="meta"),))
    model, x = Model(Experts).eval(), torch.randn(2, 12, 16)
    assert [dim for dim, _ in leaves(program)[0].aligned] == [0, 1]
    with torch.no_grad():
        same(run(program, model, x), model(x))


def test_flops_are_counted() -> None:
    model, example = Model(Experts).eval(), (torch.randn(2, 12, 16),)
    report = xir.trace(model, example).parallelize(ulysses=2).report()
    assert report.flops_total >= 3 * 2 * 24 * (16 * 48 + 16 * 3 + 16 * 16)
    assert max(report.flops_per_rank) < 0.6 * report.flops_total


class Result:
    """What a layer gives beside its tokens."""

    def __init__(self, tokens: torch.Tensor, load: torch.Tensor) -> None:
        self.tokens, self.load = tokens, load


class WithObjects(nn.Module):
    """Layers that are leaves take and return objects."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.linear = Experts(), nn.Linear(16, 16)

    def forward(self, given: Result) -> Result:
        tokens = self.experts(given.tokens)
        steps = 1 + int(given.load.abs().max().clamp(max=0).item())
        return Result(tokens * steps, given.load + tokens.sum(-1))


class OfObjects(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.kind = nn.Linear(16, 16), WithObjects()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.kind(Result(self.layer(x), x[..., 0]))
        result: torch.Tensor = found.tokens * found.load[..., None]
        return result


def test_objects_go_into_leaves_and_come_out(run: Run, same: Run) -> None:
    model, x = OfObjects().eval(), torch.randn(2, 12, 16)
    program = trace(model, (x,))
    (leaf,) = leaves(program)
    assert len(leaf.outputs) == 2 and [dim for dim, _ in leaf.aligned] == [0, 1]
    with torch.no_grad():
        same(run(program, model, x * 2), model(x * 2))
    result = xir.check(model, (x,), cfg=2)
    assert result.ok, str(result)


class OnlySome(nn.Module):
    """Fails on nothing, as a maximum does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(1 + int(x.abs().max().clamp(max=0).item())):
            x = self.linear(x).tanh()
        return x


def test_a_rank_without_rows_skips_a_leaf() -> None:
    result = xir.check(Model(OnlySome).eval(), (torch.randn(1, 3, 16),), ulysses=4)
    assert result.ok, str(result)


class InMemory(nn.Module):
    """Merges dims without a copy, as the model's tensors lie; and branches on values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.transpose(1, 2).view(-1, x.shape[1])
        y = y * 2 if y.mean().item() > 9 else y
        return y.view(x.shape[0], -1, x.shape[1]).transpose(1, 2) + torch.randn_like(x)


def test_a_leaf_gets_tensors_as_they_lie_in_the_model(run: Run) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = InMemory()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner((x * 2).transpose(1, 2))

    model, x = Model(), torch.randn(2, 16, 5)
    program = trace(model, (x,))
    assert leaves(program)
    torch.manual_seed(3)
    expected = model(x)
    torch.manual_seed(3)
    assert torch.equal(run(program, model, x.mT.contiguous().mT), expected)


def test_samples_packed_without_their_padding(run: Run) -> None:
    """PyTorch's own encoder leaves zeros where padding was: only itself gives the same."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    model, x = nn.ModuleList([encoder]), torch.randn(2, 6, 16)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.parts[0](x, src_key_padding_mask=mask)

    whole = Model().eval()
    for start, packs in ((4, True), (6, False)):
        mask = torch.arange(6).expand(2, 6) >= start
        program = trace(whole, (x, mask))
        assert bool(leaves(program)) == packs
        with torch.no_grad():
            torch.testing.assert_close(run(program, whole, x, mask), whole(x, mask))
