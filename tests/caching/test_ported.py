"""A port with a step cache on one process, and the caches of others in a ported model."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch
from diffusers.hooks import FasterCacheConfig, MagCacheConfig, TaylorSeerCacheConfig, apply_mag_cache

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.caching.hooked import caches_away, hooked_cache
from xdit_ir.ir.difference import tensors_of
from xdit_ir.sharding.report import CacheUse

CLOCK = {"timestep": 1000}  # of the pipeline, which caches of attentions ask


def denoised(module: Any, example: dict[str, Any], seed: int, steps: int = 4) -> torch.Tensor:
    x = torch.randn(example["hidden_states"].shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for step in range(steps):
            CLOCK["timestep"] = 1000 - 50 * step
            now = example | {"hidden_states": x, "timestep": example["timestep"] * (1 - 0.05 * step)}
            x = x - 0.03 * tensors_of(module(**now))[0]
    return torch.as_tensor(x).clone()


MODELS = ("flux.1-dev", "cogview4-6b", "framepack-i2v", "hunyuanimage-2.1", "hunyuanvideo", "hunyuanvideo-i2v")
MODELS += ("ltx-video", "mochi-1", "qwen-image", "wan2.1-t2v-1.3b", "wan2.1-t2v-14b")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One model with one cache of each kind; with `--zoo-all` all, in all whose output is like their latents."""
    if "name" in metafunc.fixturenames:
        further = [series(max_order=2, disable_cache_after_step=4), series(use_lite_mode=True)]
        further += [series(cache_identifiers=[r".*blocks\.\d+"]), faster(is_guidance_distilled=True)]
        cases = [
            (name, config)
            for name in MODELS
            for config in (magnitudes(1, 0.99, 0.97, threshold=0.025), hooked(1), broadcast(), *further)
        ]
        some = cases if metafunc.config.getoption("--zoo-all") else [cases[0], cases[2]]
        metafunc.parametrize(
            ("name", "config"), some, ids=lambda one: one if isinstance(one, str) else type(one).__name__
        )


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


def hooked(threshold: float = 0.1) -> Any:
    return diffusers.FirstBlockCacheConfig(threshold=threshold)


def magnitudes(*ratios: float, **options: Any) -> Any:
    return MagCacheConfig(num_inference_steps=len(ratios), mag_ratios=torch.tensor(ratios), **options)


def broadcast() -> Any:
    return diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=3,
        cross_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 980),
        current_timestep_callback=lambda: CLOCK["timestep"],
    )


def faster(**options: Any) -> Any:
    asks = {"current_timestep_callback": lambda: CLOCK["timestep"], "attention_weight_callback": lambda module: 0.4}
    return FasterCacheConfig(spatial_attention_timestep_skip_range=(-1, 980), **asks, **options)


def series(**options: Any) -> Any:
    given = {"cache_identifiers": [r".*\.attn\d?"], "taylor_factors_dtype": torch.float32} | options
    return TaylorSeerCacheConfig(cache_interval=2, **{"disable_cache_before_step": 2} | given)


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        (hooked(1), "first-block:1.0"),
        (magnitudes(1, 1, 0.99, 0.97, 0.9, 1), "steps:0,4/6"),
        (magnitudes(1, 1, 1, 1, max_skip_steps=1), "steps:0,2/4"),
        (magnitudes(1, 0.5, 1, 0.5, retention_ratio=0.5, threshold=0.1), "steps:0,1,3/4"),
    ],
)
def test_what_caches_in_hooks_mean(flux: tuple[Any, dict[str, Any]], config: Any, rule: str) -> None:
    model, _ = flux
    model.enable_cache(config)
    found = hooked_cache(model)
    assert found is not None and found.rule.text == rule
    assert found.blocks[::3] == ("transformer_blocks.0", "single_transformer_blocks.1")


def test_caches_in_hooks_are_taken_over(name: str, config: Any) -> None:
    model, example = models.load(f"{name}:tiny")
    module = xir.port(model, ulysses=1)
    exact = denoised(model, example, 0, steps=5)
    module.enable_cache(config)
    with module.cache_context("cond"):
        got = denoised(module, example, 0, steps=5)
    with module.cache_context("uncond"):
        denoised(module, example, 0, steps=1)
    assert len(module.programs) == 1, "what calls leave in hooks is no new program"
    with model.cache_context("cond"):
        want = denoised(model, example, 0, steps=5)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert (want - exact).abs().max() > 1e-3, "leaving blocks out shows"
    module.disable_cache()
    torch.testing.assert_close(denoised(module, example, 0, steps=5), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (series(disable_cache_before_step=0), r"TaylorSeerCache, which predicts before .*disable_cache"),
        (
            series(cache_identifiers=[r"transformer_blocks\.\d+(\.attn)?"]),
            r"hook on transformer_blocks.0.attn does not see the steps that leave transformer_blocks.0 out.*disable_",
        ),
        (broadcast(), r"PyramidAttentionBroadcast, which `trace` cannot take over; use `port`, which does"),
        (faster(), r"FasterCache, which makes up half of the batch .*cache='every:2'"),
        (MagCacheConfig(num_inference_steps=4, calibrate=True), r"MagCache, which looks at.*disable_cache"),
        (hooked(0.0), r"FirstBlockCache, whose threshold 0.0 leaves no block out.*disable_cache"),
        (hooked(0.1), r"FirstBlockCache, which `trace` cannot take over.*cache='first-block:0.1'"),
    ],
    ids=lambda config: type(config).__name__,
)
def test_other_caches_in_hooks_are_refused_with_what_to_use(
    flux: tuple[Any, dict[str, Any]], config: Any, said: str
) -> None:
    model, example = flux
    model.enable_cache(config)
    with pytest.raises(xir.TraceError, match=said), model.cache_context("cond"):
        xir.trace(model, example)
    model.disable_cache()
    xir.trace(model, example)


def test_two_rules_are_refused(flux: tuple[Any, dict[str, Any]]) -> None:
    model, example = flux
    model.enable_cache(hooked())
    with pytest.raises(xir.ParallelizeError, match=r"cache='every:2', and enable_cache has given .* FirstBlockCache"):
        denoised(xir.port(model, ulysses=1, cache="every:2"), example, 0)


def test_what_models_add_between_blocks_would_be_added_again(flux: tuple[Any, dict[str, Any]]) -> None:
    model, example = flux
    added = [torch.randn(1, 1, 1).expand_as(model.x_embedder(example["hidden_states"])) for _ in range(2)]
    model.enable_cache(hooked())
    module = xir.port(model, ulysses=1)
    with module.cache_context("cond"), pytest.warns(UserWarning, match="does again what stands between blocks .*add"):
        denoised(module, example | {"controlnet_block_samples": added}, 0)


def test_a_region_of_other_blocks_is_refused() -> None:
    model, example = models.load("z-image:tiny", device="meta")
    apply_mag_cache(model, magnitudes(1, 1))
    with caches_away(model):
        traced = xir.trace(model, example)
    said = "on layers.0 to layers.2 .3 blocks., while what works on the latents is noise_refiner.0"
    found = hooked_cache(model)
    with pytest.raises(xir.TraceError, match=said):
        assert found is not None and found.among({}, traced.analysed)


def test_one_process_runs_a_model_whose_cache_finds_no_blocks(flux: tuple[Any, dict[str, Any]]) -> None:
    """One layer of each kind is no block that repeats."""
    model, example = flux
    for layers in (model.transformer_blocks, model.single_transformer_blocks):
        del layers[1:]
    model.enable_cache(hooked())
    module = xir.port(model)
    with module.cache_context("cond"), pytest.warns(UserWarning, match="FirstBlockCache, which has nothing to reuse"):
        denoised(module, example, 0)


def test_the_context_says_which_step_it_is(flux: tuple[Any, dict[str, Any]]) -> None:
    """Latents that are no results of the step before: the hooks do not look at them."""
    model, example = flux
    found = []
    for module in (model, xir.port(copy.deepcopy(model), ulysses=1)):
        module.enable_cache(hooked(0.5))
        with torch.no_grad(), module.cache_context("cond"):
            steps = [example | {"timestep": example["timestep"] - step / 10} for step in range(3)]
            found.append([tensors_of(module(**step))[0].clone() for step in steps])
        module._reset_stateful_cache()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, torch.as_tensor(other), rtol=0, atol=1e-5)


def test_a_request_that_ends_is_no_reason_to_trace_anew(flux: tuple[Any, dict[str, Any]]) -> None:
    """Pipelines reset hooks at the end of a call, also those that make no context: a registry without hooks appears."""
    model, example = flux
    module = xir.port(copy.deepcopy(model), ulysses=1)
    first = denoised(module, example, 0, steps=1)
    module._reset_stateful_cache()
    torch.testing.assert_close(denoised(module, example, 0, steps=1), first, rtol=0, atol=0)
    assert len(module.programs) == 1
    module.enable_cache(hooked())
    with module.cache_context("cond"):
        denoised(module, example, 0, steps=1)
    assert len(module.programs) == 2 and module.report().cache is not None
