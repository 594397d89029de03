"""The models that are run in published size on GPUs: there, each once, and small enough."""

from __future__ import annotations

import pytest
import torch

from xdit_ir import models
from xdit_ir.models.published import PUBLISHED
from xdit_ir.models.specs import Normal

MOST = 100 * 2**30  # bytes of weights, beside activations on a GPU of 139 GiB


def test_they_are_published_sizes_of_the_zoo() -> None:
    assert all(len(set(names)) == len(names) for names in PUBLISHED.values())
    assert all(models.entry(name).full is not None for names in PUBLISHED.values() for name in names)
    assert len(PUBLISHED["u2"]) >= 22 and set(PUBLISHED["c2"]) <= set(PUBLISHED["u2"])


@pytest.mark.parametrize("name", PUBLISHED["c2"])
def test_under_cfg_there_are_two_samples(name: str) -> None:
    shapes = [item.shape for item in models.entry(name).full_inputs.values() if isinstance(item, Normal)]
    assert shapes[0][0] == 2


@pytest.mark.parametrize("name", PUBLISHED["u2"])
def test_they_fit_one_gpu(name: str, request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--zoo-all") and name != "flux.2-dev":
        pytest.skip("a second for each (--zoo-all)")
    model, _ = models.load(name, device="meta", dtype=torch.bfloat16)
    assert sum(x.numel() * x.dtype.itemsize for x in (*model.parameters(), *model.buffers())) <= MOST
