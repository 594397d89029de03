"""The demo: two real processes, the same digits; and its wrong usages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from xdit_ir.tools import demo
from xdit_ir.tools.demo_show import GAP, Row

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def test_two_processes_make_the_same_digits(tmp_path: Path) -> None:
    path = tmp_path / "pictures" / "sheet.png"
    command = [*TORCHRUN, "-m", "xdit_ir.tools.demo", "--steps", "5", "--output", str(path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=400, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    for said in ("program DiTTransformer2DModel {", "on ulysses=2 {", "1 x all_to_all()", str(path)):
        assert said in done.stdout
    assert done.stdout.count("equal  ") == 3 and "as good" in done.stdout and "NOT" not in done.stdout
    sheet = Image.open(path)
    assert sheet.size == (100 + 10 * 64, 4 * (64 + GAP))
    alone, ulysses, cfg, pipefusion = (
        sheet.crop((100, top, 740, top + 64)).tobytes() for top in range(0, 4 * (64 + GAP), 64 + GAP)
    )
    assert len(set(alone)) > 100
    for same in (ulysses, cfg):
        assert max(abs(a - b) for a, b in zip(alone, same, strict=True)) <= 1
    assert pipefusion != alone


def test_modes() -> None:
    assert list(demo.modes(2)) == ["ulysses=2", "cfg=2", "pipefusion=2"]
    assert demo.modes(4)["cfg=2"] == {"cfg": 2, "ulysses": 2}
    assert list(demo.modes(3)) == ["ulysses=3", "pipefusion=3"]


@pytest.mark.parametrize(("world", "said"), [(None, "start me with torchrun"), ("1", "2 to 6"), ("8", "not 8")])
def test_wrong_usage(
    world: str | None, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world is not None:
        monkeypatch.setenv("WORLD_SIZE", world)
    assert demo.main([]) == 2
    out, err = capsys.readouterr()
    assert said in err and out == ""


def test_a_difference_is_seen() -> None:
    image = torch.rand(2, 1, 8, 8)
    off = image.clone()
    off[1] += 0.01
    assert Row.of("same", [image, image], image, 1.0, exact=True).passes(demo.TOLERANCE)
    assert not Row.of("one rank off", [image, off], image, 1.0, exact=True).passes(demo.TOLERANCE)
    assert Row.of("stale", [off], image, 1.0, exact=False).passes(demo.TOLERANCE)
    assert not Row.of("stale", [off], image, 0.9, exact=False).passes(demo.TOLERANCE)
    assert Row.of("shape", [image[:1]], image, 1.0, exact=True).relative == float("inf")
