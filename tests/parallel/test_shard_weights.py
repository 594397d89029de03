"""Weights in equal parts on real processes: each rank keeps its own only, and the outputs are the model's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xdit_ir import models


@pytest.mark.parametrize(
    ("degrees", "share", "read"),
    [
        ({"ulysses": 2, "shard_weights": True}, 0.51, False),
        ({"tensor": 2}, 0.57, True),
        ({"ulysses": 2, "stream_weights": True}, 0.51, True),
        ({"ulysses": 2, "ring": 2, "shard_weights": "ring"}, 0.51, True),
    ],
    ids=["all of a model", "tensor of a checkpoint", "from the host, of a checkpoint", "along a mesh dim"],
)
def test_each_rank_keeps_its_part(
    request: pytest.FixtureRequest,
    workers: Callable[[int], Any],
    tmp_path: Path,
    degrees: dict[str, Any],
    share: float,
    read: bool,
) -> None:
    """For two kinds of inputs; what is loaded later would have no effect, and is refused."""
    if ("stream_weights" in degrees or "ring" in degrees) and not request.config.getoption("--large"):
        pytest.skip("as with parts on the GPU, or four processes (--large)")
    if read:
        models.load("flux.1-dev:tiny")[0].save_pretrained(tmp_path, max_shard_size="400KB")
    folder = str(tmp_path) if read else ""
    for result in workers(4 if "ring" in degrees else 2).run(
        "weights_in_parts", name="flux.1-dev", degrees=degrees, folder=folder
    ):
        assert "errors" in result and max(result["errors"]) <= 1e-5, result
        assert result["resident"] == 0
        assert max(result["held"], result["reported"]) <= share, result
        assert result["programs"] == 2
        assert len(result["refused"]) == 3
        assert all("shard_weights=True" in text for text in result["refused"]), result["refused"]


@pytest.mark.parametrize("degrees", [{"ulysses": 2, "shard_weights": True}, {"tensor": 2}], ids=["all", "tensor"])
def test_ranks_that_have_loaded_different_weights_raise(workers: Callable[[int], Any], degrees: dict[str, int]) -> None:
    for result in workers(2).run("unlike_weights", degrees=degrees):
        assert result["error"] == "MismatchError", result
        assert "qkv" in result["message"] or "out" in result["message"], result


@pytest.mark.parametrize("division", [{"ulysses": 2, "stream_weights": True}, {"tensor": 2}], ids=str)
def test_an_emitted_module_holds_parts_too(workers: Callable[[int], Any], division: dict[str, Any]) -> None:
    for result in workers(2).run("equal_outputs", name="pixart-sigma", degree_sets=[division]):
        assert "errors" in result and max(result["errors"]) <= 1e-5, result
