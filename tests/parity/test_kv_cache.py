"""Stale keys and values in fewer bits: what the option says, how large buffers are, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.api import TracedProgram
from xdit_ir.emission.execution import Execution
from xdit_ir.ir.difference import relative_error, tensors_of
from xdit_ir.pipelined.pipe_runner import check_pipeline

P2 = {"pipefusion": 2, "patches": 2}
FP8 = torch.finfo(torch.float8_e4m3fn)


@dataclass
class Case:
    model: nn.Module
    example: dict[str, Any]
    other: dict[str, Any]
    traced: TracedProgram


@pytest.fixture(scope="module")
def flux() -> Case:
    """A model with text tokens in joint attention, of which the keys wait with those of the image."""
    model, example = models.load("flux.1-dev:tiny")
    other = example | {"hidden_states": example["hidden_states"].flip(1)}
    return Case(model, example, other, xir.trace(model, example))


@contextmanager
def rounded_keys(dtype: torch.dtype) -> Iterator[None]:
    """Attention over keys and values as they come out of a cache of this dtype; fp8 with a scale for each row."""
    original = F.scaled_dot_product_attention

    def rounded(x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax(-1, keepdim=True) / FP8.max if dtype.itemsize == 1 else torch.ones(())
        return (x / scale).to(dtype).to(x.dtype) * scale

    def attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return original(query, rounded(key), rounded(value), *args, **kwargs)

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("fp8_e4m3", torch.float8_e4m3fn)])
def test_a_warmup_step_is_the_model_with_rounded_keys_and_values(name: str, dtype: torch.dtype, flux: Case) -> None:
    parallel = flux.traced.parallelize(**P2, kv_cache_dtype=name)
    with torch.no_grad(), rounded_keys(dtype):
        expected = tensors_of(flux.model(**flux.example))
    [step] = parallel.simulate_steps(flux.model, [flux.example])
    exact = tensors_of(flux.model(**flux.example))
    assert relative_error(tensors_of(step[0]), expected) <= 1e-4 < relative_error(expected, exact) * 2


def test_ranks_run_what_is_simulated(flux: Case) -> None:
    parallel = flux.traced.parallelize(**P2, ulysses=2, kv_cache_dtype="fp8_e4m3")
    inputs = [flux.other, flux.example, flux.example]
    steps, runs = parallel.simulate_steps(flux.model, inputs), parallel.run_steps(flux.model, inputs)
    full = flux.traced.parallelize(**P2, ulysses=2).simulate_steps(flux.model, inputs)
    for step, run, wide in zip(steps, runs, full, strict=True):
        assert relative_error(tensors_of(run[0]), tensors_of(step[0])) == 0
        assert 1e-4 < relative_error(tensors_of(step[0]), tensors_of(wide[0])) < 1e-2


def test_the_report_has_the_buffers_before_and_after(flux: Case) -> None:
    full = flux.traced.parallelize(**P2).report()
    half, eighth = (flux.traced.parallelize(**P2, kv_cache_dtype=name).report() for name in ("bfloat16", "fp8_e4m3"))
    before = full.buffer_bytes_per_rank
    assert full.full_buffer_bytes_per_rank == half.full_buffer_bytes_per_rank == before
    assert eighth.full_buffer_bytes_per_rank == before and [one.buffers for one in eighth.memory] == (
        eighth.buffer_bytes_per_rank
    )
    # 4, 2, and 1 byte an element and 4 for each row of 16; the rest are results
    kept = sum(before) - sum(half.buffer_bytes_per_rank)
    assert sum(before) - sum(eighth.buffer_bytes_per_rank) == 2 * kept * (3 - 4 / 16) / 4
    assert "in the model's dtype" not in str(full) and re.search(r"\(0\.\d MiB with keys and values in", str(eighth))
    assert eighth.fallbacks == full.fallbacks


def test_refused_by_name(flux: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(xir.ParallelizeError, match="kv_cache_dtype='fp8': expected one of auto, bfloat16, fp8_e4m3"):
        flux.traced.parallelize(**P2, kv_cache_dtype="fp8")
    with pytest.raises(xir.ParallelizeError, match=r"kv_cache_dtype='bfloat16' needs pipefusion > 1"):
        flux.traced.parallelize(ulysses=2, kv_cache_dtype="bfloat16")
    with pytest.raises(xir.ParallelizeError, match="kv_cache_dtype='fp8_e4m3' needs pipefusion > 1"):
        xir.port(flux.model, ulysses=1, kv_cache_dtype="fp8_e4m3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    program, gpu = flux.traced.parallelize(**P2, kv_cache_dtype="fp8_e4m3").ir, torch.device("cuda")
    check_pipeline(program, Execution(), gpu)
    with pytest.raises(
        xir.ParallelizeError, match=r"capability \(8, 9\), and this GPU has \(8, 0\); nearest legal: kv"
    ):
        check_pipeline(program, Execution(compile=True), gpu)
