"""Unmodified diffusers pipelines on several processes: the same latents as on one, on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Pools = Callable[[int], Any]
Degrees = dict[str, int]

DEGREES: dict[str, Degrees] = {
    "u2": {"ulysses": 2},
    "c2": {"cfg": 2},
    "p2": {"pipefusion": 2, "patches": 2, "warmup_steps": 2},  # as many warmup steps as steps
    "c2u2": {"cfg": 2, "ulysses": 2},
}
# What CI runs: several pipelines under each set of two ranks.
TURNS = {
    "u2": ("kontext", "flux2", "sana", "flux_ip_adapter"),
    "c2": ("sd3", "qwen", "wan22", "ltx", "zimage"),
    "p2": ("flux", "pixart", "img2img"),
    "c2u2": ("wan",),
}
# With `--pipelines-all`, these as well, and each under every set.
FURTHER = (
    *("qwen_edit", "wan_i2v", "lumina2", "flux_controlnet", "hunyuanvideo", "sd3_controlnet"),
    *("hunyuandit", "cogvideo"),
)
# A control network whose results are not divided like its latents cannot be a pipeline of patches; it runs whole.
NAMED = {("sd3_controlnet", "p2"): ["transformer"]}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "pipeline" not in metafunc.fixturenames:
        return
    cases = [(name, kind) for kind, names in TURNS.items() for name in names]
    if metafunc.config.getoption("--pipelines-all"):
        cases = [(name, kind) for name in sorted({*FURTHER, *(name for name, _ in cases)}) for kind in DEGREES]
    metafunc.parametrize(("pipeline", "kind"), cases)


def test_latents_are_those_of_one_process(workers: Pools, pipeline: str, kind: str) -> None:
    degrees = DEGREES[kind]
    count = degrees.get("cfg", 1) * degrees.get("ulysses", 1) * degrees.get("pipefusion", 1)
    named = NAMED.get((pipeline, kind))
    for answer in workers(count).run("whole_pipelines", name=pipeline, degree_sets=[degrees], denoisers=named):
        assert isinstance(answer, list), answer
        [result] = answer
        assert result["error"] <= 1e-4, result
        assert result["spread"] > 0.1 and min(result["programs"]) >= 1
        expected = 2 if pipeline == "wan22" or "controlnet" in pipeline else 1
        assert len(result["programs"]) == (expected if named is None else len(named))


def test_a_control_network_without_patches_is_refused(workers: Pools) -> None:
    arguments = {"name": "sd3_controlnet", "degree_sets": [DEGREES["p2"]], "denoisers": None}
    for answer in workers(2).run("whole_pipelines", **arguments):
        assert answer["error"] == "ParallelizeError"
        assert "the output is not divided like the latents" in answer["message"], answer
