"""Every model of the zoo under PipeFusion on two processes: each call is the model's, displaced ones too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from xdit_ir import models

Pools = Callable[[int], Any]

# Always run: of different layouts of patches and requests, and quick; all others with `--zoo-all`.
QUICK = (
    "longcat-image",
    "lumina-2",
    "plain-dit",
    "transformer-2d-patched",
    "transformer-2d-vectorized",
    "transformer-temporal",
    "wan-animate-2-reference",
    "wan2.1-t2v-14b",
)
# What forward writes into cannot be put off.
WRITES = dict.fromkeys(("anyflow-far", "wan-animate-2-reference"), "forward writes into what it is given")

# Discrete latents, which are drawn from the output: such steps begin anew.
CODES = ("transformer-2d-vectorized",)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", models.names() if metafunc.config.getoption("--zoo-all") else QUICK)


def test_calls_of_two_processes_are_the_models(workers: Pools, name: str, of_one_patch: dict[str, str]) -> None:
    results = workers(2).run("fixed_point", name=name)
    why = WRITES.get(name)
    if why is not None:
        assert {result["error"] for result in results} == {"ParallelizeError"}, results
        assert len({result["message"] for result in results}) == 1 and why in results[0]["message"], results
        return
    for result in results:
        assert max(result.get("errors", [1])) <= 1e-4, result
        put_off = 0 if name in CODES or name in of_one_patch else 2
        assert result["steps"] == put_off and (result["displaced"] == put_off or name in of_one_patch), result
