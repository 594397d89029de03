"""A stack of equal layers whose weights go over ranks, or come from the host."""

from __future__ import annotations

import torch
from torch import nn

X = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0))


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


class Stack(nn.Module):
    """Layers, of which the first may be skipped, between two projections that share a weight."""

    def __init__(self, layers: int = 6, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))

    def forward(self, x: torch.Tensor, skip: bool = False) -> torch.Tensor:
        x = self.embed(x)
        for layer in self.layers[int(skip) :]:
            x = layer(x)
        return self.embed(x)
