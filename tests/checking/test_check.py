"""`check`: equal programs pass, broken ones are found where they break, bad input is explained."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx, nn

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.api import ParallelProgram, TracedProgram
from xdit_ir.checking.check import check_parallel
from xdit_ir.ir import ops
from xdit_ir.ir.graphs import copy_graph, map_graphs

aten = torch.ops.aten
Mutation = Callable[[fx.Graph], bool]


@pytest.fixture(scope="module")
def case() -> tuple[Any, dict[str, Any]]:
    return models.load("pixart-sigma:tiny")


@pytest.fixture(scope="module")
def parallel(case: tuple[Any, dict[str, Any]]) -> ParallelProgram:
    return xir.trace(*case).parallelize(ulysses=2)


def test_equal(case: tuple[Any, dict[str, Any]]) -> None:
    result = xir.check(*case, ulysses=2, ring=2)
    assert result.ok
    assert result.max_relative_error <= 1e-5
    assert result.first_divergence is None
    assert str(result).startswith("equal: 4 ranks")


def nodes(graph: fx.Graph, target: Any) -> list[fx.Node]:
    return [node for node in graph.nodes if node.target is target]


def wrong_scale(graph: fx.Graph) -> bool:
    for node in nodes(graph, ops.attention)[:1]:
        node.kwargs = {**node.kwargs, "scale": 0.5}
        return True
    return False


def wrong_activation(graph: fx.Graph) -> bool:
    for node in nodes(graph, aten.gelu.default)[: len(nodes(graph, ops.attention))][:1]:
        node.target, node.kwargs = aten.relu.default, {}
        return True
    return False


def keys_left_unsent(graph: fx.Graph) -> bool:
    """The queries are sent in place of the keys."""
    for node in nodes(graph, ops.attention)[:1]:
        q, _, v = node.args[:3]
        node.args = (q, q, v)
        return True
    return False


@pytest.mark.parametrize("mutation", [wrong_scale, wrong_activation, keys_left_unsent])
def test_the_first_divergence_is_the_broken_node(
    mutation: Mutation, case: tuple[Any, dict[str, Any]], parallel: ParallelProgram
) -> None:
    model, example = case
    broken: list[str] = []

    def rewrite(graph: fx.Graph) -> None:
        before = {node.name: (node.target, node.args, node.kwargs) for node in graph.nodes}
        if mutation(graph):
            changed = [n for n in graph.nodes if before[n.name] != (n.target, n.args, n.kwargs)]
            broken.extend(node.name for node in changed)

    result = check_parallel(replace(parallel, ir=map_graphs(parallel.ir, rewrite), _ranks={}), model, example)

    assert not result.ok
    found = result.first_divergence
    assert found is not None
    assert found.block == "transformer_blocks.0"
    assert found.node in broken
    assert ".py:" in found.source
    assert "first divergence: transformer_blocks.0" in str(result)


@pytest.mark.parametrize(
    ("degrees", "named"),
    [
        ({"ulises": 2}, "ulises"),
        ({"ulysses": 0}, "ulysses=1"),
        ({"ring": 2.5}, "ring=1"),
        ({"cfg": 3}, "cfg=2"),
        ({"pipefusion": 100}, "at most pipefusion="),
        ({"pipefusion": 2, "patches": 0}, "patches=1"),
        ({"pipefusion": 2, "warmup_steps": 0}, "warmup_steps=1"),
        ({"pipefusion": 2, "patches": 300}, "at most 256"),
        ({"pipefusion": 2, "stages": [9]}, "for example"),
        ({"stages": [1, 1]}, "pipefusion > 1"),
        ({"patches": 4}, "patches"),
    ],
)
def test_illegal_degrees_name_the_nearest_legal_one(
    degrees: dict[str, Any], named: str, case: tuple[Any, dict[str, Any]]
) -> None:
    with pytest.raises(xir.ParallelizeError, match=named):
        xir.trace(*case).parallelize(**degrees)


def test_a_single_sample_has_nothing_to_split(case: tuple[Any, dict[str, Any]]) -> None:
    model, example = case
    single = {key: value[:1] if isinstance(value, torch.Tensor) else value for key, value in example.items()}
    with pytest.raises(xir.ParallelizeError, match=r"batch of 1.*cfg=1"):
        xir.trace(model, single).parallelize(cfg=2)


def test_a_changed_shape_is_refused(case: tuple[Any, dict[str, Any]], parallel: ParallelProgram) -> None:
    model, example = case
    other = {**example, "hidden_states": torch.zeros(2, 4, 16, 16)}
    with pytest.raises(xir.MismatchError, match="hidden_states"):
        parallel.simulate(model, other)


class Counting(nn.Module):
    """A layer that does something else at every other forward, or something more."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.done = how, tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - a trace cannot see into it
        self.qkv, self.more = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.done.write(b".")
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        if self.how == "value":
            return x * (1 + self.done.tell() % 2)
        return self.more(x) if self.done.tell() % 2 else x


@pytest.mark.parametrize(("how", "named"), [("value", "0"), ("call", "0.more")])
def test_a_model_that_remembers_is_found(how: str, named: str) -> None:
    model = nn.Sequential(Counting(how), nn.Linear(8, 8))
    result = xir.check(model, (torch.randn(1, 12, 8),), ulysses=2)
    assert not result.ok
    assert any("keeps a state" in note for note in result.notes) or "captured" in result.notes[0]
    found = result.first_divergence
    assert found is not None and found.block == named and found.rank is None
    assert "second forward" in found.problem and "test_check.py:" in found.source


def test_a_capture_that_is_not_the_module_is_located(case: tuple[Any, dict[str, Any]]) -> None:
    """As if the tracer had taken a layer's activation for another one."""
    model, example = case
    traced = xir.trace(model, example)

    def wrong(graph: fx.Graph) -> None:
        for node in nodes(graph, aten.gelu.default):
            node.target, node.kwargs = aten.relu.default, {}

    result = xir.check(model, example, traced=TracedProgram(map_graphs(traced.ir, wrong)), ulysses=2)
    found = result.first_divergence
    assert not result.ok and found is not None
    assert found.node in ("GELU", "GELUTanh") or "act" in found.block or found.block.endswith("ff.net.0"), found
    assert "computes this nowhere" in found.problem


def test_where_a_rank_is_wrong_is_said(case: tuple[Any, dict[str, Any]], parallel: ParallelProgram) -> None:
    """One token of one rank's part: the ranks that are right, the global index and the extent are named."""
    bad = parallel.rank(1)
    graph = copy_graph(bad.graph)
    [shard] = [node for node in nodes(graph, ops.take) if node.args[0].name == "hidden_states"]
    with graph.inserting_after(shard):
        added = graph.call_function(spoiled, (shard,))
    shard.replace_all_uses_with(added, delete_user_cb=lambda user: user is not added)
    added.name, shard.name = shard.name, "before"
    result = check_parallel(replace(parallel, _ranks={1: bad.replace(graph=graph)}), *case)
    text = str(result)
    assert "wrong on rank 1 of 0-1" in text
    assert "wrong only in dim 1 at 2 (of 0-3), dim 2 at 19 (of 16-31)" in text
    found = result.first_divergence
    assert found is not None and found.difference is not None
    assert found.difference.at[1:3] == (2, 19) and found.difference.got.shape == (2, 4, 16, 32)


def spoiled(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[:, 2, 3] += 5
    return y


@pytest.mark.parametrize(("scale", "text"), [(0.0, "nothing but zeros"), (float("nan"), "is finite")])
def test_outputs_that_tell_nothing_are_noted(scale: float, text: str) -> None:
    """New models often end with a layer of zeros: then anything before it is equal."""
    model = nn.Linear(4, 4).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(scale)
    result = xir.check(model, (torch.randn(2, 8, 4),), cfg=2)
    assert result.ok and text in str(result)
    assert not xir.check(nn.Linear(4, 4).eval(), (torch.randn(2, 8, 4),), cfg=2).notes
