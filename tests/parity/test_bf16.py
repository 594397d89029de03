"""Reduced precision: float32 simulations cannot see a cast that is lost, moved or made too early.

No fixed tolerance would mean anything: bfloat16 keeps 8 bits, so that each of some hundred roundings on the way to an
output is off by up to 2^-9, and models differ in how they magnify that. So the model is its own measure. Its output in
bfloat16 differs from that of the same weights and inputs in float32 by what rounding costs, e. A divided program sums
in another order; its roundings are others, but as good, so it too must be within about e of the float32 output. A lost
or early cast rounds where the model does not, and adds to that. The factor 1.25 leaves room for chance: over the
thousands of numbers of an output it averages out to a few percent (1.05 is the most seen). By the triangle inequality a
rank and the model may differ by 2.25 e.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._pytree import tree_map_only

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.ir.difference import relative_error, tensors_of

NAMES = (
    "cogvideox-5b",
    "hunyuandit",
    "latte-1",
    "pixart-sigma",
    "plain-packed-dit",
    "qwen-image",
    "sana-1600m",
    "sd3.5-large",
    "wan2.1-t2v-14b",
)
DEGREES: tuple[dict[str, int], ...] = ({"ulysses": 3}, {"ring": 2})
MARGIN = 1.25


def widened(value: torch.Tensor) -> torch.Tensor:
    return value.float() if value.dtype == torch.bfloat16 else value


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every model under one set of degrees, the other one for the next model; both with `--zoo-all`."""
    if "name" in metafunc.fixturenames:
        everything = metafunc.config.getoption("--zoo-all")
        turns = (DEGREES if everything else DEGREES[place % 2 :][:1] for place in range(len(NAMES)))
        metafunc.parametrize(("name", "degree_sets"), list(zip(NAMES, turns, strict=True)), ids=NAMES)


def test_as_good_as_the_model(name: str, degree_sets: tuple[dict[str, int], ...]) -> None:
    model, example = models.load(f"{name}:tiny", dtype=torch.bfloat16)
    with torch.no_grad():
        single = tensors_of(model(**example))
        truth = tensors_of(copy.deepcopy(model).float()(**tree_map_only(torch.Tensor, widened, example)))
    rounding = relative_error(single, truth)
    assert 1e-4 < rounding < 5e-2, "the model does not compute in bfloat16"
    traced = xir.trace(model, example)
    for degrees in degree_sets:
        for rank, output in enumerate(traced.parallelize(**degrees).simulate(model, example)):
            found = tensors_of(output)
            assert [one.dtype for one in found] == [one.dtype for one in single]
            assert relative_error(found, truth) <= MARGIN * rounding, f"{degrees}, rank {rank}"
            assert relative_error(found, single) <= (1 + MARGIN) * rounding, f"{degrees}, rank {rank}"
