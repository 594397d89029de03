"""Every model of the zoo under PipeFusion: equal, with several patches or, for a reason that is written down, one."""

from __future__ import annotations

import pytest
from test_zoo import NOT_CAPTURED

import xdit_ir as xir
from xdit_ir import models

FILLS_A_CACHE = "wan-animate-2-reference"  # of which nothing may be stale: one patch, and so no buffers


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every twenty-fourth model, all of them with `--zoo-all`."""
    if "name" not in metafunc.fixturenames:
        return
    step = 1 if metafunc.config.getoption("--zoo-all") else 24
    metafunc.parametrize("name", [name for name in models.names() if name not in NOT_CAPTURED][::step])


def test_exact_when_synchronous_and_at_the_fixed_point(name: str, of_one_patch: dict[str, str]) -> None:
    model, example = models.load(f"{name}:tiny")
    traced = xir.trace(model, example)
    if name in of_one_patch:
        with pytest.raises(xir.ParallelizeError, match=of_one_patch[name]):
            traced.parallelize(pipefusion=2, patches=2)
        with pytest.warns(UserWarning, match="none were given: patches=2 .* use patches=1, which is taken; with one"):
            result = xir.check(model, example, traced=traced, pipefusion=2)
    else:
        report = traced.parallelize(pipefusion=2).report()
        work = sum(report.flops_per_rank) / report.flops_total
        assert work <= 1.05
        assert (min(report.buffer_bytes_per_rank) > 0) == (name != FILLS_A_CACHE)
        result = xir.check(model, example, traced=traced, pipefusion=2)
    assert result.ok, str(result)


def test_a_second_short_stream_of_latents_is_computed_once_a_step() -> None:
    """Sound beside pictures: it goes with the first patch, as text does."""
    model, example = models.load("kandinsky-6:tiny")
    report = xir.trace(model, example).parallelize(pipefusion=2).report()
    assert sum(report.flops_per_rank) <= 1.001 * report.flops_total
