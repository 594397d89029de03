"""`xdit-ir generate` on several processes: the images of one, written once; and errors that all of them give."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from xdit_ir.ir.mesh import MESH_DIMS
from xdit_ir.tools.cli import main

Pools = Callable[[int], Any]
CALL = ["--negative", "blurry", "--size", "128x128", "--steps", "2", "--set", "use_resolution_binning=false"]
PROMPTS = ["--prompt", "a cat", "--prompt", "a dog at dusk"]


@pytest.fixture(scope="module")
def alone(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes."""
    output = tmp_path_factory.mktemp("alone")
    assert main(["generate", str(pipeline_folder), *PROMPTS, *CALL, "--output", str(output)]) == 0
    return output


def same_images(one: Path, other: Path) -> None:
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in other.iterdir())
    for path in one.glob("*.png"):
        got, want = (np.array(Image.open(folder / path.name)).astype(int) for folder in (one, other))
        assert got.shape == want.shape and want.std() > 10
        assert abs(got - want).max() <= 1


@pytest.mark.parametrize("degree", ["cfg", "ulysses", "data"])
def test_two_processes_write_the_files_of_one(
    workers: Pools, pipeline_folder: Path, alone: Path, tmp_path: Path, degree: str
) -> None:
    arguments = [str(pipeline_folder), *PROMPTS, *CALL, f"--{degree}", "2", "--output", str(tmp_path)]
    first, second = workers(2).run("generate_files", arguments=arguments)
    assert (first["status"], second["status"]) == (0, 0), (first, second)
    assert ("0001.png" in first["out"]) == (degree != "data") and "2/2" in first["err"]
    assert second["out"] == "" and "it/s" not in second["err"]
    same_images(alone, tmp_path)
    report = json.loads((tmp_path / "generate.json").read_text())
    assert report["processes"] == 2 and {**report["options"], **report}[degree] == 2
    assert report["weights"] == "read by each rank"
    assert list(report["phases"]) == ["load", "port", "encode", "denoise", "decode"]
    if degree == "ulysses":
        assert report["parts"]["transformer"]["shares"] == pytest.approx([0.5, 0.5], abs=0.02)
        assert "saves at most" in report["parts"]["vae.decode"]["whole"]
        assert "ranks do 0.5" in first["out"] and "vae.decode: whole" in first["out"]


def test_without_degrees_they_are_planned(workers: Pools, pipeline_folder: Path, alone: Path, tmp_path: Path) -> None:
    arguments = [str(pipeline_folder), *PROMPTS, *CALL, "--output", str(tmp_path)]
    first, second = workers(2).run("generate_files", arguments=arguments)
    assert (first["status"], second["status"]) == (0, 0), (first, second)
    same_images(alone, tmp_path)
    options = json.loads((tmp_path / "generate.json").read_text())["options"]
    assert math.prod(options[name] for name in MESH_DIMS) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--cfg", "3"], r"cfg=3 needs 3 processes, this job has 2; nearest legal: cfg=2"),
        (["--ulysses", "1"], r"ulysses=1 needs 1 process, this job has 2; nearest legal: ulysses=2"),
        (["--ulysses", "2", "--device", "cuda"], "sees no GPU"),
    ],
)
def test_all_processes_refuse(workers: Pools, pipeline_folder: Path, options: list[str], said: str) -> None:
    for answer in workers(2).run("generate_files", arguments=[str(pipeline_folder), *PROMPTS, *CALL, *options]):
        assert answer["status"] == 2
        assert said in answer["err"], answer["err"]


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
# Rank 1 fails in the middle, while the other waits for it.
FAILING = """
import os, sys
import diffusers
from xdit_ir.tools.cli import main

step = diffusers.DPMSolverMultistepScheduler.step
def broken(*args, **kwargs):
    if os.environ["RANK"] == "1":
        raise RuntimeError("a device was lost")
    return step(*args, **kwargs)
diffusers.DPMSolverMultistepScheduler.step = broken
sys.exit(main(sys.argv[1:]))
"""


def torchrun(processes: int, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = (*TORCHRUN, str(processes), *command)
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, check=False)


@pytest.fixture
def slow(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--pipelines-all"):
        pytest.skip("needs --pipelines-all: starts processes of its own")


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("options", [["--data", "2"], ["--pipefusion", "2", "--warmup", "2"]], ids=["data", "stages"])
def test_under_torchrun(pipeline_folder: Path, alone: Path, tmp_path: Path, options: list[str]) -> None:
    command = ["generate", str(pipeline_folder), *PROMPTS, *CALL, *options, "--output", str(tmp_path)]
    done = torchrun(2, "-m", "xdit_ir.tools.cli", *command)
    assert done.returncode == 0, done.stderr
    same_images(alone, tmp_path)


@pytest.mark.usefixtures("slow")
def test_a_failing_rank_ends_the_job(pipeline_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    command = ["generate", str(pipeline_folder), *PROMPTS, *CALL, "--ulysses", "2", "--output", str(tmp_path / "out")]
    began = time.monotonic()
    done = torchrun(2, str(tmp_path / "failing.py"), *command)
    assert done.returncode != 0 and "a device was lost" in done.stderr
    assert time.monotonic() - began < 120 and not (tmp_path / "out").exists()
