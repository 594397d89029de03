"""PipeFusion, simulated: exact when synchronous, exact at the fixed point, and in between what the method says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from displaced import DisplacedReference
from torch import nn

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.api import ParallelProgram, TracedProgram
from xdit_ir.ir.difference import relative_error, tensors_of
from xdit_ir.ir.mesh import TIME
from xdit_ir.ir.program import LAYOUT
from xdit_ir.pipefusion.stage_search import folded


@dataclass(frozen=True)
class Shape:
    """What the reference must know about a tiny model: text tokens in joint attention, and how image tokens lie."""

    text: int = 0
    text_first: bool = True
    grid: tuple[int, ...] | None = (16, 16)


MODELS = {
    "flux.1-dev": Shape(16, grid=None),
    "sd3.5-large": Shape(16, text_first=False),
    "pixart-sigma": Shape(),
    "wan2.1-t2v-14b": Shape(grid=(4, 8, 8)),
    "hunyuandit": Shape(),
}
DEGREES = {
    "p2m1": {"pipefusion": 2, "patches": 1},
    "p2m2": {"pipefusion": 2},
    "p3m4": {"pipefusion": 3, "patches": 4},
    "p4m5": {"pipefusion": 4, "patches": 5},
    "c2p2m2": {"cfg": 2, "pipefusion": 2},
    "p2m2u2": {"pipefusion": 2, "ulysses": 2},
    "p2m4r2": {"pipefusion": 2, "patches": 4, "ring": 2},
    "c2p2m2u2": {"cfg": 2, "pipefusion": 2, "ulysses": 2},
}

FOLDED = {
    "flux.1-dev": {"pipefusion": 2},
    "sd3.5-large": {"cfg": 2, "pipefusion": 2, "patches": 3},
    "hunyuandit": {"pipefusion": 3, "patches": 4, "ulysses": 2},
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A quarter of the sets of degrees, another one for each next model, and every other model for what goes without;
    all of them with `--zoo-all`."""
    everything = metafunc.config.getoption("--zoo-all")
    if "degrees" in metafunc.fixturenames:
        step = 1 if everything else 4
        chosen = [(model, one) for place, model in enumerate(MODELS) for one in list(DEGREES)[place % step :: step]]
        values = [(model, DEGREES[one]) for model, one in chosen]
        metafunc.parametrize(("case", "degrees"), values, ids=map("-".join, chosen), indirect=["case"], scope="module")
    elif "case" in metafunc.fixturenames and not list(metafunc.definition.iter_markers("parametrize")):
        names = list(MODELS)[:: 1 if everything else 2]
        metafunc.parametrize("case", names, indirect=True, scope="module")


@dataclass
class Case:
    name: str
    model: nn.Module
    example: dict[str, Any]
    other: dict[str, Any]
    traced: TracedProgram


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    model, example = models.load(f"{request.param}:tiny")
    traced = xir.trace(model, example)
    noise = torch.randn(example["hidden_states"].shape, generator=torch.Generator().manual_seed(7))
    other = example | {"hidden_states": example["hidden_states"] + 0.3 * noise, "timestep": example["timestep"] * 0.9}
    if example["timestep"].dtype != other["timestep"].dtype:
        other["timestep"] = example["timestep"] - 40
    yield Case(request.param, model, example, other, traced)


def plain(model: nn.Module, example: dict[str, Any]) -> list[torch.Tensor]:
    with torch.no_grad():
        return tensors_of(model(**example))


def worst(step: list[Any], expected: list[torch.Tensor]) -> float:
    return max(relative_error(tensors_of(output), expected) for output in step)


def token_patches(traced: TracedProgram, parallel: ParallelProgram) -> list[torch.Tensor]:
    """The image tokens of every patch, as the program divides them; ranks of one patch together."""
    axis = traced.analysed.tokens[0]
    node = next(node for node in parallel.ir.graph.nodes if node.name == axis.value)
    partition, mesh = node.meta[LAYOUT].dims[axis.dim], parallel.ir.mesh
    assert mesh is not None
    if partition is None:
        return [torch.arange(axis.size)]
    found: list[set[int]] = [set() for _ in range(mesh.size((TIME,)))]
    for rank, part in enumerate(partition.parts):
        found[mesh.index(rank, (TIME,))] |= set(part.array.tolist())
    return [torch.tensor(sorted(tokens)) for tokens in found]


def test_every_step_is_what_the_method_says(case: Case, degrees: dict[str, int]) -> None:
    compare_steps(case, degrees, case.traced.parallelize(**degrees))


@pytest.mark.parametrize("case", FOLDED, indirect=True)
def test_folded_stages_change_nothing(case: Case) -> None:
    degrees = FOLDED[case.name]
    blocks, count = len(list(case.traced.analysed.calls)), 2 * degrees["pipefusion"]
    stages = [blocks // count + (stage < blocks % count) for stage in range(count)]
    parallel = case.traced.parallelize(**degrees, stages=stages)
    assert parallel.pipeline is not None
    assert parallel.pipeline.coordinates == folded(degrees["pipefusion"])
    compare_steps(case, degrees, parallel)


def compare_steps(case: Case, degrees: dict[str, int], parallel: ParallelProgram) -> None:
    """Compare consecutive steps with the model itself and with the reference of displaced steps."""
    patches = token_patches(case.traced, parallel)
    count = degrees.get("patches", degrees["pipefusion"])
    assert len(patches) == count
    assert sorted(torch.cat(patches).tolist()) == list(range(256))
    assert max(map(len, patches)) <= 0.75 * 256 or count == 1

    inputs = [case.example, case.example, case.other, case.other]
    steps = parallel.simulate_steps(case.model, [*inputs, *[case.other] * 6])
    assert all(len(step) == parallel.world_size for step in steps)
    assert worst(steps[0], plain(case.model, case.example)) <= 1e-5, "warmup"
    assert worst(steps[1], plain(case.model, case.example)) <= 1e-5, "equal inputs"

    shape = MODELS[case.name]
    reference = DisplacedReference(case.model, patches, shape.text, shape.text_first, shape.grid)
    reference.warmup(inputs[0])
    expected = [[reference.step(one)] for one in inputs[1:]]
    for step, values in zip(steps[1:], expected, strict=False):
        assert worst(step, values) <= 1e-5, "displaced"
    exact = plain(case.model, case.other)
    if count > 1:
        assert relative_error(expected[1], exact) > 1e-4, "a stale step differs from the exact one"
    assert worst(steps[-1], exact) <= 1e-5, "fixed point"


def test_several_warmup_steps_are_exact(case: Case) -> None:
    parallel = case.traced.parallelize(pipefusion=2, patches=4, warmup_steps=2)
    first, second, third = parallel.simulate_steps(case.model, [case.example, case.other, case.example])
    assert worst(first, plain(case.model, case.example)) <= 1e-5
    assert worst(second, plain(case.model, case.other)) <= 1e-5
    assert worst(third, plain(case.model, case.example)) > 1e-4


def test_a_request_never_reads_the_last_ones_buffers(case: Case) -> None:
    parallel = case.traced.parallelize(pipefusion=2)
    parallel.simulate_steps(case.model, [case.other, case.other])
    [first] = parallel.simulate_steps(case.model, [case.example])
    assert worst(first, plain(case.model, case.example)) <= 1e-5
