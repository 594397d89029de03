"""Weights in equal parts on real processes: each rank keeps its own only, and the outputs are the model's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xdit_ir import models


@pytest.mark.parametrize("name", ["flux.1-dev", "wan2.1-t2v-14b"])
def test_each_rank_keeps_its_part(workers: Callable[[int], Any], name: str) -> None:
    for result in workers(2).run("sharded_weights", name=name, degrees={"ulysses": 2}):
        assert max(result["errors"]) <= 1e-5, result
        assert result["resident"] == 0
        assert result["held"] <= 0.51, result
        assert result["reported"] <= 0.51, result
        assert result["programs"] == 2


def test_each_rank_reads_its_part_of_a_checkpoint(workers: Callable[[int], Any], tmp_path: Path) -> None:
    models.load("flux.1-dev:tiny")[0].save_pretrained(tmp_path, max_shard_size="400KB")
    for result in workers(2).run("sharded_weights", name="flux.1-dev", degrees={"ulysses": 2}, folder=str(tmp_path)):
        assert max(result["errors"]) <= 1e-5, result
        assert result["held"] <= 0.51, result
