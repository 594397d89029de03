"""Adapters that come, go and change behind a port: the same latents as where the same is done without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("peft")
Pools = Callable[[int], Any]


def check(found: list[dict[str, Any]]) -> None:
    for result in found:
        assert result["error"] <= 1e-4, result
        assert result["act"] == "unfuse" or result["change"] > 0.01, result
    made = {result["act"]: result["programs"] for result in found}
    assert made["enable"] == made["disable"], "what was made before is found"


def test_on_two_processes(workers: Pools) -> None:
    for found in workers(2).run("adapters", degrees={"ulysses": 2}, port_at="second"):
        check(found)


@pytest.mark.parametrize("port_at", ["load", "scale", "fuse"])
def test_whenever_the_port_is_made(port_at: str, request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--pipelines-all"):
        pytest.skip("needs --pipelines-all")
    import pipeline_jobs  # type: ignore[import-not-found]

    check(pipeline_jobs.adapters({}, port_at))
