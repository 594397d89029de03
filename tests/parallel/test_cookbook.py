"""Every task of docs/cookbook.md on two processes: the result of one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Pools = Callable[[int], Any]
PAGE = (Path(__file__).parents[2] / "docs" / "cookbook.md").read_text()
NEEDS = {"lora": "peft", "quantised": "torchao"}
TASKS = re.findall(r"<!-- task: (\w+) -->", PAGE)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Two of the tasks, all with `--pipelines-all`."""
    if "task" in metafunc.fixturenames:
        metafunc.parametrize("task", TASKS if metafunc.config.getoption("--pipelines-all") else ("quantised", "custom"))


def test_two_processes_give_what_one_gives(workers: Pools, task: str, request: pytest.FixtureRequest) -> None:
    if task in NEEDS:
        pytest.importorskip(NEEDS[task])
    folder = str(request.getfixturevalue("pipeline_folder")) if task == "memory" else ""
    for found in workers(2).run("cooked", name=task, published=folder):
        assert "error" not in found, found
        # An image of a file has 256 levels.
        assert max(found["errors"]) <= (1.01 / 255 if task == "memory" else 1e-4), found
        assert found["spread"] > 1e-2, found


def test_there_are_ten_tasks_of_ten_lines() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(set(TASKS)) == len(blocks) == 10
    assert max(len([line for line in block.splitlines() if line]) for block in blocks) <= 10
