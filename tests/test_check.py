"""`check`: equal programs pass, broken ones are found where they break, bad input is explained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx

import xdit_ir as xir
from xdit_ir import models, ops
from xdit_ir.api import ParallelProgram
from xdit_ir.check import check_parallel
from xdit_ir.passes.base import map_graphs

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
        ({"pipefusion": 2, "patches": 300}, "patches=1"),
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
