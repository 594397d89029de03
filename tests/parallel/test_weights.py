"""Weights that every rank reads for itself, on real processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from xdit_ir import models


def test_ranks_read_a_checkpoint_or_none_goes_on(workers: Callable[[int], Any], tmp_path: Path) -> None:
    models.load("flux.1-dev:tiny")[0].save_pretrained(tmp_path, max_shard_size="400KB")
    results = workers(2).run("from_checkpoint", name="flux.1-dev", folder=str(tmp_path), degrees={"ulysses": 2})
    for result in results:
        assert result["difference"] <= 1e-5, result
        assert result["resident"] == 0
        assert result["error"] == "MismatchError"
        assert "elsewhere.safetensors is missing" in result["message"]
