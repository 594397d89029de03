"""Where latents enter: by unfolded patches, joined to a text by channels, as codes that index a table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import xdit_ir as xir
from xdit_ir.models.kinds.parts import blocks


class Folded(nn.Module):
    """Patches by `F.unfold`, and back by `F.fold`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Linear(16, 32), blocks(32, 4), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = x.shape[-2:]
        x = self.embed(F.unfold(x, 2, stride=2).mT)
        for block in self.blocks:
            x = block(x)
        return F.fold(self.head(x).mT.contiguous(), size, 2, stride=2)


class Spoken(nn.Module):
    """A text, padded to a letter for each frame of sound, joined to that by channels; positions for all."""

    def __init__(self) -> None:
        super().__init__()
        self.letters, self.embed, self.head = nn.Embedding(30, 8), nn.Linear(12, 32), nn.Linear(32, 4)
        self.blocks = blocks(32, 4)

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        text = F.pad(text + 1, (0, x.shape[1] - text.shape[1]))
        x = self.embed(torch.cat([x, self.letters(text)], dim=-1))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Absorbing(nn.Module):
    """Codes that index a table, packed for attention, and what they are already is not to be made again."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head, self.blocks = nn.Parameter(torch.randn(20, 32)), nn.Linear(32, 20), blocks(32, 4)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        x = self.table[codes]
        for block in self.blocks:
            x = block(x).flatten(0, 1).unflatten(0, codes.shape)
        x = self.head(x)
        return torch.scatter(x, -1, codes[..., None], torch.zeros_like(x[..., :1]))


CASES: dict[type[nn.Module], dict[str, Any]] = {
    Folded: {"x": torch.randn(2, 4, 16, 16)},
    Spoken: {"x": torch.randn(2, 64, 4), "text": torch.randint(0, 29, (2, 20))},
    Absorbing: {"codes": torch.randint(0, 20, (2, 64))},
}


@pytest.mark.parametrize("kind", CASES, ids=lambda kind: str(kind.__name__))
def test_patches_in_time(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    traced = xir.trace(model, CASES[kind])
    result = xir.check(model, CASES[kind], traced=traced, pipefusion=2)
    assert result.ok, result
    assert traced.parallelize(pipefusion=2).report().share < 0.6


def test_windows_side_by_side_are_views() -> None:
    """Those that overlap, or leave something out, are windows of each dim, whose sums are added up."""
    for size, stride, summed in ((2, 2, False), (3, 1, True), (3, 3, True)):
        model = nn.Sequential(nn.Unfold(size, stride=stride), nn.Fold((16, 16), size, stride=stride)).eval()
        x = torch.randn(1, 2, 16, 16)
        program = xir.trace(model, (x,)).analysed
        assert not any("im2" in str(node.target) or "2im" in str(node.target) for node in program.graph.nodes)
        assert any("overlap_add" in str(node.target) for node in program.graph.nodes) == summed
        assert xir.check(model, (x,), cfg=1).ok
