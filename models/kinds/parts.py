"""What the kinds share: attention, a feed-forward network, a block of both, the timestep."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    """Self-attention, or to `context`, of [batch, tokens, width]."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(
        self, x: torch.Tensor, context: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`mask` broadcasts to [batch, heads, queries, keys]."""
        source = x if context is None else context
        k, v = self.kv(source).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        out: torch.Tensor = self.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))
        return out


def mlp(width: int, ratio: int = 4) -> nn.Sequential:
    """Two layers, token by token."""
    return nn.Sequential(nn.Linear(width, ratio * width), nn.GELU(), nn.Linear(ratio * width, width))


class Block(nn.Module):
    """Attention and a feed-forward network, each behind a norm."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.mlp = Attention(width, heads), mlp(width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens [batch, tokens, width]."""
        x = x + self.attention(self.norm1(x), mask=mask)
        x = x + self.mlp(self.norm2(x))
        return x


class Timestep(nn.Module):
    """A vector for each timestep [batch]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.mlp = width, mlp(width, 1)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """Sines and cosines of many wavelengths, and a feed-forward network."""
        rates = torch.exp(torch.arange(self.width // 2, device=t.device) * (-math.log(1000.0) / (self.width // 2)))
        angles = 1000 * t[:, None].float() * rates
        weight = next(self.mlp.parameters())
        out: torch.Tensor = self.mlp(torch.cat([angles.sin(), angles.cos()], dim=1).to(weight.dtype))
        return out


def blocks(width: int, depth: int = 3) -> nn.ModuleList:
    """Several `Block`s."""
    return nn.ModuleList(Block(width) for _ in range(depth))
