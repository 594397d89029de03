"""Which partition of the tokens `shard-tokens` chooses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import xdit_ir as xir

FRAMES, PLACES, WIDTH = 6, 32, 16


class Factorised(nn.Module):
    """Attention within each frame, then over time at each place, of [batch, frames * places, width]."""

    def __init__(self) -> None:
        super().__init__()
        self.space, self.time = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)

    def attend(self, qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = qkv.unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch = x.shape[0]
        x = x + self.attend(self.space(x).view(batch * FRAMES, PLACES, -1)).view(batch, -1, WIDTH)
        y = self.time(x).view(batch, FRAMES, PLACES, -1).transpose(1, 2).reshape(batch * PLACES, FRAMES, -1)
        y = self.attend(y).view(batch, PLACES, FRAMES, WIDTH).transpose(1, 2)
        return x + y.reshape(batch, -1, WIDTH)


def test_places_of_every_frame_where_frames_do_not_divide() -> None:
    """Six frames on four ranks: whole frames would leave one rank a third of the work."""
    model, example = nn.Sequential(Factorised(), Factorised()), (torch.randn(2, FRAMES * PLACES, WIDTH),)
    parallel = xir.trace(model, example).parallelize(ulysses=4)
    report = parallel.report()
    assert max(report.flops_per_rank) <= 0.26 * report.flops_total
    assert report.fallbacks == []
    result = xir.check(model, example, ulysses=4)
    assert result.ok, str(result)
