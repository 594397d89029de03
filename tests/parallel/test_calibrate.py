"""`xdit-ir calibrate` on processes: exchanges are measured too, and the file is taken by itself."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xdit_ir.planning.hardware import load

Pools = Callable[[int], Any]


def test_exchanges(workers: Pools, tmp_path: Path) -> None:
    output = tmp_path / "here.toml"
    said, nothing = workers(2).run("calibrated", output=str(output))
    assert not nothing, "one process says what all measured"
    assert sum(line.startswith("all-to-all by collectives") for line in said) == 3
    [link] = load(str(output)).links
    assert link.ranks == 2 and link.bytes > 1e6 and link.latency >= 0 and not link.hidden
    assert "measured by xdit-ir calibrate on" in load(str(output)).sources["links"]


def test_the_command(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--large"):
        pytest.skip("needs --large: starts processes of its own")
    output = tmp_path / "here.toml"
    command = ["calibrate", "--device", "cpu", "--gpus", "2", "--output", str(output)]
    made = subprocess.run(
        [sys.executable, "-m", "xdit_ir.tools.cli", *command], capture_output=True, text=True, timeout=240, check=False
    )
    assert made.returncode == 0, made.stderr
    assert f"written to {output}" in made.stdout and "links = " in made.stdout
    assert load(str(output)).links[0].ranks == 2
