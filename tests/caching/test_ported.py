"""A port with a step cache on one process, and the caches of others in a ported model."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers.hooks import MagCacheConfig, TaylorSeerCacheConfig

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.ir.difference import tensors_of
from xdit_ir.sharding.report import CacheUse


def denoised(module: Any, example: dict[str, Any], seed: int, steps: int = 4) -> torch.Tensor:
    x = torch.randn(example["hidden_states"].shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for step in range(steps):
            now = example | {"hidden_states": x, "timestep": example["timestep"] * (1 - 0.05 * step)}
            x = x - 0.03 * tensors_of(module(**now))[0]
    return torch.as_tensor(x).clone()


@pytest.fixture
def flux() -> tuple[Any, dict[str, Any]]:
    return models.load("flux.1-dev:tiny")


def test_a_request_reuses_nothing_of_another_one(flux: tuple[Any, dict[str, Any]]) -> None:
    model, example = flux
    module = xir.port(model, ulysses=1, cache="every:3")
    first, second = denoised(module, example, 0), denoised(module, example, 1)
    assert module.report().cache == CacheUse("every:3", 8, 4)
    torch.testing.assert_close(denoised(module, example, 0), first, rtol=0, atol=0)
    torch.testing.assert_close(denoised(module, example, 1), second, rtol=0, atol=0)
    assert (first - denoised(model, example, 0)).abs().max() > 1e-3, "leaving blocks out shows"


@pytest.mark.parametrize(
    "config",
    [
        diffusers.FirstBlockCacheConfig(threshold=0.1),
        TaylorSeerCacheConfig(),
        MagCacheConfig(num_inference_steps=4, mag_ratios=torch.ones(4)),
        diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
        ),
    ],
    ids=lambda config: type(config).__name__,
)
def test_caches_in_hooks_are_refused_with_what_to_use(flux: tuple[Any, dict[str, Any]], config: Any) -> None:
    model, example = flux
    model.enable_cache(config)
    with pytest.raises(xir.TraceError, match=r"cache='first-block:0\.08'"), model.cache_context("cond"):
        xir.trace(model, example)
    model.disable_cache()
    xir.trace(model, example)
