"""Step caches over ranks in lockstep: what one rank with the same cache gives, and as many steps skipped."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

import xdit_ir as xir
from xdit_ir import capture, models
from xdit_ir.api import ParallelProgram, TracedProgram
from xdit_ir.caching.cut import cut_cached
from xdit_ir.caching.kept import Taylor
from xdit_ir.caching.rule import CacheRule, Group, Watched
from xdit_ir.errors import ParallelizeError
from xdit_ir.ir.difference import tensors_of
from xdit_ir.ir.program import Program
from xdit_ir.sharding.cost import program_flops
from xdit_ir.sharding.report import CacheUse

STEPS = 4
CASES = [
    ("flux.1-dev", "first-block:0.4", {"ulysses": 2}),
    ("flux.1-dev", "every:2", {"ulysses": 2, "shard_weights": True}),
    ("wan2.1-t2v-14b", "timestep:0.3", {"ring": 2}),
    ("wan2.1-t2v-14b", "first-block:0.4", {"ulysses": 3}),
    ("qwen-image", "first-block:1.5", {"cfg": 2, "ulysses": 2}),
    ("z-image", "first-block:1.5", {"ulysses": 2}),  # texts join behind the first block: kept as it is
    ("hunyuandit", "timestep:1.5", {"ulysses": 2}),  # results of early blocks go on in late ones
]


def steps(example: dict[str, Any]) -> list[dict[str, Any]]:
    """Latents and timestep that move a little from step to step."""
    moving = {name: x for name, x in example.items() if "timestep" in name or name in ("hidden_states", "t", "x")}
    return [example | {name: moved(x, step) for name, x in moving.items()} for step in range(STEPS)]


def moved(x: Any, step: int) -> Any:
    if isinstance(x, list):
        return [moved(one, step) for one in x]
    return x * (1 - 0.02 * step) if x.is_floating_point() else x - step


def ran(parallel: ParallelProgram, model: Any, examples: list[dict[str, Any]]) -> list[torch.Tensor]:
    found = parallel.simulate_steps(model, examples)
    return [torch.stack([tensors_of(rank)[0] for rank in step]) for step in found]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every third case, all with `--zoo-all`."""
    if "name" in metafunc.fixturenames:
        cases = CASES if metafunc.config.getoption("--zoo-all") else CASES[::3]
        metafunc.parametrize(("name", "cache", "degrees"), cases)


def test_ranks_give_what_one_gives(name: str, cache: str, degrees: dict[str, Any]) -> None:
    model, example = models.load(f"{name}:tiny")
    traced, examples = xir.trace(model, example), steps(example)
    alone = traced.parallelize(cache=cache)
    want = ran(alone, model, examples)
    parallel = traced.parallelize(**degrees, cache=cache)
    for got, one in zip(ran(parallel, model, examples), want, strict=True):
        torch.testing.assert_close(got, one.expand_as(got), rtol=0, atol=1e-4 * float(one.abs().max()))
    used = parallel.report().cache
    assert used is not None and 0 < used.skipped < used.calls == STEPS
    assert used == alone.report().cache
    assert f"{used.skipped} of {STEPS} calls reused" in str(parallel.report())


def calls(program: Program | None) -> int:
    return 0 if program is None else len(list(program.calls))


@pytest.mark.parametrize(("cache", "run"), [("first-block:0.1", (1, 3, 0)), ("every:2", (0, 4, 0))])
def test_blocks_of_the_region_are_in_one_program_only(cache: str, run: tuple[int, ...]) -> None:
    model, example = models.load("flux.1-dev:tiny", device="meta")
    cut = cut_cached(xir.trace(model, example).parallelize(cache=cache).ir)
    assert (calls(cut.head), *map(calls, cut.rest.values())) == run


def odd(step: int) -> bool:
    return step % 2 == 1


def from_second(step: int) -> bool:
    return step >= 2


def test_values_inside_blocks_are_reused_by_groups_of_steps() -> None:
    """What is not reused is computed, and what only reused values need is not."""
    model, example = models.load("flux.1-dev:tiny")
    marked = {name: int(name.startswith("single")) for name, _ in model.named_modules() if name.endswith("attn")}
    traced = TracedProgram(capture.trace(model, example, marked=marked))
    rule = CacheRule("modules", Watched.NOTHING, groups=(Group(odd), Group(from_second, partial(Taylor, 1))))
    alone, parallel = traced.parallelize(cache=rule), traced.parallelize(ulysses=2, cache=rule)
    flops = [program_flops(one, None)[0] for one in alone.cached.rest.values()]
    assert flops[0] > max(flops[1:3]) and flops[3] == flops[1] + flops[2] - flops[0]
    assert len(alone.cached.points) == 6, "two values of each layer of two streams, one of the others"
    want = ran(alone, model, steps(example))
    for got, one in zip(ran(parallel, model, steps(example)), want, strict=True):
        torch.testing.assert_close(got, one.expand_as(got), rtol=0, atol=1e-4 * float(one.abs().max()))
    assert parallel.report().cache == CacheUse("modules", STEPS, 3)
    with pytest.raises(ParallelizeError, match=r"cache='modules'.*also for another branch.*nearest legal: ulysses=2"):
        traced.parallelize(cfg=2, pair_calls=True, cache=replace(rule, branchless=True))


def test_with_pipefusion_it_is_refused() -> None:
    model, example = models.load("flux.1-dev:tiny", device="meta")
    with pytest.raises(ParallelizeError, match=r"cache='every:2' with pipefusion=2.*nearest legal: ulysses=2"):
        xir.trace(model, example).parallelize(pipefusion=2, cache="every:2")
    with pytest.raises(ParallelizeError, match="cache='every:2' with pipefusion=2"):
        xir.port(model, pipefusion=2, cache="every:2")


def test_a_model_of_one_block_has_nothing_to_leave_out() -> None:
    layer = torch.nn.TransformerEncoderLayer(32, 2, 64, batch_first=True).eval()
    with pytest.raises(ParallelizeError, match=r"cache: .*leave cache out"):
        xir.trace(layer, (torch.randn(1, 16, 32),)).parallelize(cache="first-block:0.1")
