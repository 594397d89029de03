"""Quantised models: every rank's output is that of the quantised model on one device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quantisation import DYNAMIC, WAYS
from torch import nn

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.api import TracedProgram
from xdit_ir.ir.difference import relative_error, tensors_of
from xdit_ir.passes.base import run_passes
from xdit_ir.passes.order import rank_passes

DEGREES: dict[str, dict[str, Any]] = {
    "u2": {"ulysses": 2},
    "c2": {"cfg": 2},
    "r2": {"ring": 2},
    "u2-sharded": {"ulysses": 2, "shard_weights": True},
    "t2": {"tensor": 2},
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A small transformer under a set of degrees a way; with `--zoo-all` three models more, under all."""
    everything = metafunc.config.getoption("--zoo-all")
    if metafunc.fixturenames == ["way"]:
        metafunc.parametrize("way", sorted(WAYS.keys() - {"float8_by_tensors"}) if everything else ["int8_dynamic"])
    if "degrees" not in metafunc.fixturenames:
        return
    names = ("small", "flux.1-dev", "sd3.5-large", "wan2.1-t2v-1.3b") if everything else ("small",)
    tries = [(name, way, degrees) for name in names for way in WAYS for degrees in DEGREES]
    # Wan's own code takes the dtype of a packed weight for that of its numbers.
    tries = [one for one in tries if one[:2] != ("wan2.1-t2v-1.3b", "gguf")]
    if not everything:
        tries = [one for place, one in enumerate(tries) if place // len(DEGREES) % len(DEGREES) == place % len(DEGREES)]
    metafunc.parametrize(("name", "way", "degrees"), tries, ids=map("-".join, tries))


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out, self.norm = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Small(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(width, width), nn.Linear(width, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(3))

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        x = self.first(latents)
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


def quantised(name: str, way: str) -> tuple[nn.Module, dict[str, Any]]:
    if name == "small":
        torch.manual_seed(0)
        model, example = Small(), {"latents": torch.randn(2, 24, 32)}
    else:
        model, example = models.load(f"{name}:tiny")
    WAYS[way](model.eval().requires_grad_(False))
    return model, example


def run(model: nn.Module, example: dict[str, Any]) -> list[torch.Tensor]:
    with torch.no_grad():
        return tensors_of(model(**example))


def limit(model: nn.Module, example: dict[str, Any], way: str) -> float:
    """What the quantised model itself makes of a change in the seventh digit, where it rounds activations."""
    if way not in DYNAMIC:
        return 1e-5
    key = next(iter(example))
    noise = torch.randn(example[key].shape, generator=torch.Generator().manual_seed(1))
    return max(
        1e-5, 2 * relative_error(run(model, {**example, key: example[key] * (1 + 1e-6 * noise)}), run(model, example))
    )


def test_every_rank_gives_the_quantised_models_output(name: str, way: str, degrees: str) -> None:
    model, example = quantised(name, way)
    want, most = run(model, example), limit(model, example, way)
    parallel = xir.trace(model, example).parallelize(**DEGREES[degrees])
    for rank, output in enumerate(parallel.simulate(model, example)):
        assert relative_error(tensors_of(output), want) <= most, f"rank {rank}"
    if degrees != "t2":
        assert parallel.report().fallbacks == []
    if degrees == "u2-sharded":
        assert parallel.report().weight_share <= (0.61 if name == "small" else 0.53), (
            "from a multiple of 256 bytes on each"
        )
    for mode in ({}, {"compiled": True}, {"compiled": True, "recorded": True}):
        run_passes(parallel.rank(0), rank_passes((9, 0), **mode))  # which no CPU needs


def test_pipefusion_is_exact_while_it_is_synchronous(way: str) -> None:
    model, example = quantised("small", way)
    parallel = xir.trace(model, example).parallelize(pipefusion=3)
    want, most = run(model, example), limit(model, example, way)
    for step in parallel.simulate_steps(model, [example] * 2):
        assert max(relative_error(tensors_of(output), want) for output in step) <= most


@pytest.mark.parametrize("made", ["int8_weights", "layerwise_casting"])
def test_stages_keep_no_weights_that_were_made_larger(made: str) -> None:
    """What patches leave for each other is what it is without quantised weights."""
    buffers = []
    for way in (None, made):
        model, example = Small().eval().requires_grad_(False), {"latents": torch.randn(2, 24, 32)}
        if way is not None:
            WAYS[way](model)
        report = xir.trace(model, example).parallelize(pipefusion=2).report()
        buffers.append([one.buffers for one in report.memory])
    assert buffers[0] == buffers[1]


def test_the_scale_of_a_whole_tensor_is_that_of_all_ranks() -> None:
    """A number a row is gathered, once for all layers that take the tensor; not the tensor."""
    model, example = quantised("small", "float8_by_tensors")
    example["latents"][:, 20:] *= 9  # the second rank has the largest
    want = run(model, example)
    traced: TracedProgram = xir.trace(model, example)
    parallel = traced.parallelize(ulysses=2)
    for output in parallel.simulate(model, example):
        assert relative_error(tensors_of(output), want) <= limit(model, example, "float8_by_tensors")
    [gathers] = [one for one in parallel.report().collectives if one.kind == "gather"]
    rows, scales = 2 * 24, 2 + 4 * 3  # of the first and last layer, and of four in each of three
    assert gathers.count <= scales + 1, "and of the result"
    assert gathers.bytes_per_rank <= (4 * rows * scales + 4 * rows * 32) / 2
    with pytest.raises(xir.ParallelizeError, match="would read stale rows"):
        traced.parallelize(pipefusion=2, patches=2)
