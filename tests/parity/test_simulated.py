"""The promise, on nine models: every rank's output is the model's, the work is really split, nothing falls back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.api import TracedProgram
from xdit_ir.ir import ops
from xdit_ir.ir.difference import relative_error, tensors_of

MODELS = (
    "flux.1-dev",
    "sd3.5-large",
    "pixart-sigma",
    "wan2.1-t2v-14b",
    "cogvideox-5b",
    "hunyuandit",
    "qwen-image",
    "latte-1",
    "sana-1600m",
)
DEGREES = {
    "u2": {"ulysses": 2},
    "u3": {"ulysses": 3},
    "u4": {"ulysses": 4},
    "r2": {"ring": 2},
    "r3": {"ring": 3},
    "u2r2": {"ulysses": 2, "ring": 2},
    "c2": {"cfg": 2},
    "c2u2": {"cfg": 2, "ulysses": 2},
    "c2u2r2": {"cfg": 2, "ulysses": 2, "ring": 2},
}


@dataclass
class Case:
    """A tiny model with its single-device output and FLOPs."""

    model: nn.Module
    example: dict[str, Any]
    traced: TracedProgram
    expected: list[torch.Tensor]
    flops: int


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A quarter of the sets of degrees, others for each next model; all of them with `--zoo-all`."""
    if "degrees" in metafunc.fixturenames:
        step = 1 if metafunc.config.getoption("--zoo-all") else 4
        places = [(m, d) for m in range(len(MODELS)) for d in range(len(DEGREES)) if (m + d) % step == 0]
        pairs = [(MODELS[m], list(DEGREES)[d]) for m, d in places]
        sets = [(model, DEGREES[name]) for model, name in pairs]
        ids = ["-".join(pair) for pair in pairs]
        metafunc.parametrize(("case", "degrees"), sets, indirect=["case"], ids=ids, scope="module")


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    model, example = models.load(f"{request.param}:tiny")
    traced = xir.trace(model, example)
    expected, flops = counted(lambda: tensors_of(model(**example)))
    yield Case(model, example, traced, expected, flops)


def counted(run: Any) -> tuple[Any, int]:
    """A result and its FLOPs; the math backend, since the counter knows its matrix products on every device."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = run()
    return result, counter.get_total_flops()


def test_every_rank_gives_the_models_output_and_does_its_share(case: Case, degrees: dict[str, int]) -> None:
    parallel = case.traced.parallelize(**degrees)
    outputs, work = counted(lambda: parallel.simulate(case.model, case.example))

    assert len(outputs) == parallel.world_size
    for rank, output in enumerate(outputs):
        assert relative_error(tensors_of(output), case.expected) <= 1e-5, f"rank {rank}"
    assert work <= 1.10 * case.flops
    report = parallel.report()
    assert report.fallbacks == []
    assert report.flops_total == case.flops
    kernels = (module.kernel_size for module in case.model.modules() if isinstance(module, nn.Conv2d))
    dropped = 0.01 if any(size > 1 for kernel in kernels for size in kernel) else 0  # behind borders of parts
    assert 0 <= work - sum(report.flops_per_rank) <= dropped * work


def inside_blocks(**degrees: int) -> Counter[str]:
    """Communications in all block bodies of a model with self- and cross-attention, by kind."""
    program = xir.trace(*models.load("pixart-sigma:tiny")).parallelize(**degrees).ir
    nodes = [node for block in program.blocks.values() for node in block.graph.nodes]
    return Counter(node.target.__name__ for node in nodes if ops.is_relayout(node.target))


def test_cross_attention_and_cfg_need_no_communication_inside_blocks() -> None:
    assert inside_blocks(ulysses=2) == {"all_to_all": 4}
    assert inside_blocks(cfg=2) == {}
