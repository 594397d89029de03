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
# What it leaves in its arguments is needed at once, so a call takes one patch and is finished when it returns.
WRITES = ("wan-animate-2-reference",)

# Discrete latents, which are drawn from the output: such steps begin anew.
CODES = ("transformer-2d-vectorized",)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", models.names() if metafunc.config.getoption("--zoo-all") else QUICK)


def test_calls_of_two_processes_are_the_models(workers: Pools, name: str, of_one_patch: dict[str, str]) -> None:
    results = workers(2).run("fixed_point", name=name)
    for result in results:
        assert max(result.get("errors", [1])) <= 1e-4, result
        of_one = name in of_one_patch or name in WRITES
        put_off = 0 if name in CODES or of_one else 2
        assert result["steps"] == put_off and (result["displaced"] == put_off or of_one), result
