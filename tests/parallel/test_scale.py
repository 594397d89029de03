"""Four and eight gloo processes: every way to use them that `bench --scale` times on as many GPUs."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxTransformer2DModel

from xdit_ir import models
from xdit_ir.degrees import Degrees
from xdit_ir.testing import run_processes
from xdit_ir.tools import scale

SETS = [degrees for gpus in (4, 8) for degrees in scale.degree_sets(gpus) if degrees.ranks == gpus]


@pytest.mark.parametrize("degrees", SETS, ids=str)
def test_every_process_has_what_one_device_computes(degrees: Degrees, request: pytest.FixtureRequest) -> None:
    """Under PipeFusion the first, synchronous step."""
    if not request.config.getoption("--large"):
        pytest.skip("needs --large: four or eight processes")
    tiny, example = models.load("flux.1-dev:tiny")
    torch.manual_seed(0)
    more = {"num_attention_heads": 8, "num_layers": 4, "num_single_layers": 8}
    model = FluxTransformer2DModel.from_config(dict(tiny.config) | more).eval()
    errors = run_processes(model, example, degrees.as_dict(), limit=600)
    assert len(errors) == degrees.ranks and max(errors) < 1e-5
