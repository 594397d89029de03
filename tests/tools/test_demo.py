"""The demo: two real processes, one image; and its wrong usages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from xdit_ir.tools import demo
from xdit_ir.tools.demo_show import Difference

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def test_two_processes_make_the_same_image(tmp_path: Path) -> None:
    path = tmp_path / "pictures" / "pair.png"
    command = [*TORCHRUN, "-m", "xdit_ir.tools.demo", "--steps", "2", "--output", str(path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=400, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    for said in ("program FluxTransformer2DModel {", "on ulysses=2 {", "3 x all_to_all()", str(path)):
        assert said in done.stdout
    assert done.stdout.count("equal  ") == 2 and "DIFFERENT" not in done.stdout
    picture = Image.open(path)
    assert picture.size == (2 * 256 + 8, 256)
    left, right = (picture.crop((x, 0, x + 256, 256)).tobytes() for x in (0, 264))
    assert len(set(left)) > 100
    assert max(abs(a - b) for a, b in zip(left, right, strict=True)) <= 1


@pytest.mark.parametrize(
    ("world", "argv", "said"),
    [
        (None, [], "start me with torchrun"),
        ("2", ["--ring", "3"], "--nproc-per-node 3"),
        ("2", ["--cfg", "2", "--ulysses", "2"], "--nproc-per-node 4"),
    ],
)
def test_wrong_usage(
    world: str | None,
    argv: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world is not None:
        monkeypatch.setenv("WORLD_SIZE", world)
    assert demo.main(argv) == 2
    out, err = capsys.readouterr()
    assert said in err and out == ""


def test_a_difference_is_seen() -> None:
    image = torch.rand(1, 3, 8, 8)
    assert Difference.of(image, image) == Difference(0.0, 0.0)
    assert Difference.of(image + 0.01, image).relative > demo.TOLERANCE
    assert Difference.of(image[:, :, :4], image).relative == float("inf")
