"""The demo on two real processes: the same digits by all ways."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from xdit_ir.tools.demo_show import GAP

Pools = Callable[[int], Any]


def test_two_processes_make_the_same_digits(workers: Pools, tmp_path: Path) -> None:
    path = tmp_path / "pictures" / "sheet.png"
    pool = type(workers(2))(2)  # processes of its own: it ends their process group
    try:
        lead, other = pool.run("demo", arguments=["--steps", "5", "--output", str(path)])
    finally:
        pool.stop()
    assert (lead["status"], other["status"]) == (0, 0), lead["err"] + other["err"]
    out = lead["out"]
    for said in ("program DiTTransformer2DModel {", "on ulysses=2 {", "1 x all_to_all()", str(path)):
        assert said.replace("\n", "") in out.replace("\n", "")
    assert out.count("equal  ") == 3 and "as good" in out and "NOT" not in out
    assert other["out"] == ""
    sheet = Image.open(path)
    assert sheet.size == (100 + 10 * 64, 4 * (64 + GAP))
    alone, ulysses, cfg, pipefusion = (
        sheet.crop((100, top, 740, top + 64)).tobytes() for top in range(0, 4 * (64 + GAP), 64 + GAP)
    )
    assert len(set(alone)) > 100
    for same in (ulysses, cfg):
        assert max(abs(a - b) for a, b in zip(alone, same, strict=True)) <= 1
    assert pipefusion != alone
