"""The demo: what it shows, and its wrong usages; `tests/parallel/test_demo.py` runs it."""

from __future__ import annotations

import pytest
import torch

from xdit_ir.tools import demo
from xdit_ir.tools.demo_show import ModeRow


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
    assert ModeRow.of("same", [image, image], image, 1.0, exact=True).passes(demo.TOLERANCE)
    assert not ModeRow.of("one rank off", [image, off], image, 1.0, exact=True).passes(demo.TOLERANCE)
    assert ModeRow.of("stale", [off], image, 1.0, exact=False).passes(demo.TOLERANCE)
    assert not ModeRow.of("stale", [off], image, 0.9, exact=False).passes(demo.TOLERANCE)
    assert ModeRow.of("shape", [image[:1]], image, 1.0, exact=True).relative == float("inf")
