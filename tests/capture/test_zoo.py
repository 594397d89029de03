"""Every model of the zoo: equal bit by bit on new inputs and new weights, from the CPU and from the meta device."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map_only

from xdit_ir import models
from xdit_ir.capture import trace
from xdit_ir.ir.program import SPEC, WEIGHT, WHERE, Program, TensorSpec, is_block_call

NAMES = [
    "cogvideox-5b",
    "flux.1-dev",
    "hunyuandit",
    "latte-1",
    "pixart-sigma",
    "qwen-image",
    "sana-1600m",
    "sd3.5-large",
    "wan2.1-t2v-14b",
]
Run = Callable[..., Any]


@functools.cache
def traced(name: str) -> tuple[torch.nn.Module, dict[str, Any], Program]:
    model, example = models.load(f"{name}:tiny")
    return model, example, trace(model, example)


def fresh(example: dict[str, Any]) -> dict[str, Any]:
    """Other latents, text and timesteps, the same masks and ids."""

    def other(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.dtype.is_floating_point:
            return tensor
        return torch.randn_like(tensor) if tensor.dim() > 1 else tensor * 0.7 + 0.1

    return tree_map_only(torch.Tensor, other, example)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", NAMES)
def test_equal_on_fresh_inputs_and_weights(name: str, run: Run, same: Run) -> None:
    model, example, program = traced(name)
    twin, _ = models.load(f"{name}:tiny", seed=7)
    for weights in (model, twin):
        for inputs in (example, fresh(example)):
            with torch.no_grad():
                same(run(program, weights, **inputs), weights(**inputs))


@pytest.mark.parametrize("name", NAMES)
def test_traced_on_meta(name: str, run: Run, same: Run) -> None:
    hollow, example = models.load(f"{name}:tiny", device="meta")
    program = trace(hollow, example)
    model, inputs, _ = traced(name)
    assert program.device.type == "meta"
    with torch.no_grad():
        same(run(program, model, **inputs), model(**inputs))


@pytest.mark.parametrize("name", NAMES)
def test_well_formed(name: str) -> None:
    model, _, program = traced(name)
    graphs = [program.graph, *(block.graph for block in program.blocks.values())]
    for node in (node for graph in graphs for node in graph.nodes):
        assert set(node.meta) - {WEIGHT} == {SPEC, WHERE}
        assert WEIGHT not in node.meta or node.op == "placeholder"
        assert isinstance(node.meta[SPEC], (TensorSpec, tuple))
        if isinstance(node.target, torch._ops.OpOverload):
            assert not node.target._schema.is_mutable
    for graph in graphs:
        graph.lint()
    modules = dict(model.named_modules())
    assert {node.meta[WHERE].module for node in program.graph.nodes} <= set(modules)
    for call in program.calls:
        body = program.blocks[str(call.args[0])].graph
        paths = {f"{call.args[1]}.{node.meta[WHERE].module}".rstrip(".") for node in body.nodes}
        assert paths <= set(modules)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for key, spec in program.state.items():
        assert spec == TensorSpec(tuple(state[key].shape), state[key].dtype)


def kinds(program: Program) -> set[str]:
    return {str(node.target) for block in program.blocks.values() for node in block.graph.nodes}


@pytest.mark.parametrize("name", NAMES)
def test_composite_operators_stay_whole(name: str) -> None:
    _, _, program = traced(name)
    found = kinds(program)
    assert "aten.linear.default" in found
    assert not found & {"aten.addmm.default", "aten.t.default", "aten.native_layer_norm.default"}
    if name != "sana-1600m":
        assert "aten.scaled_dot_product_attention.default" in found


@pytest.mark.parametrize("name", ["flux.1-dev", "sd3.5-large", "wan2.1-t2v-14b", "hunyuandit"])
def test_full_size_from_meta_is_quick(name: str) -> None:
    model, example = models.load(name, device="meta", dtype=torch.bfloat16)
    start = time.perf_counter()
    program = trace(model, example)
    assert time.perf_counter() - start < 20
    assert len(program.blocks) == {"wan2.1-t2v-14b": 1}.get(name, 2)
    layers = sum(is_block_call(node) for node in program.graph.nodes)
    assert layers == {"flux.1-dev": 57, "sd3.5-large": 38, "wan2.1-t2v-14b": 40, "hunyuandit": 40}[name]
