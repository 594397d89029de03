"""Modules that change themselves in forward: cast, or fill tables."""

from __future__ import annotations

import torch
from torch import nn

from .parts import Timestep, blocks


class CastsItself(nn.Module):
    """`self.head.float()` in forward: the weights are, or become, single precision."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Linear(4, width), blocks(width), nn.Linear(width, 4)
        self.time = Timestep(width)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, tokens, 4]."""
        x = self.embed(x) + self.time.float()(t)[:, None]
        for block in self.blocks:
            x = block.to(x.dtype)(x)
        return self.head.float()(x.float())


class FillsTable(nn.Module):
    """A table that is kept as a buffer of zeros, and filled at the first call as far as it is needed."""

    cached: torch.Tensor

    def __init__(self, width: int = 32, longest: int = 128) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Linear(4, width), blocks(width), nn.Linear(width, 4)
        self.register_buffer("cached", torch.zeros(longest, width), persistent=False)
        self.filled, self.width = 0, width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, tokens, 4]."""
        n = x.shape[1]
        if n > self.filled:
            rates = 100 ** -torch.linspace(0, 1, self.width // 2, device=x.device)
            angles = torch.arange(n, device=x.device)[:, None] * rates
            self.cached[:n] = torch.cat([angles.sin(), angles.cos()], dim=1)
            self.filled = n
        x = self.embed(x) + self.cached[:n]
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class FillsEveryTime(nn.Module):
    """A table in a plain attribute that every call writes anew."""

    def __init__(self, width: int = 32, longest: int = 128) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Linear(4, width), blocks(width), nn.Linear(width, 4)
        self.table, self.width = torch.zeros(longest, width), width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, tokens, 4]."""
        freqs = torch.outer(torch.arange(x.shape[1]).float(), 100 ** -torch.linspace(0, 1, self.width))
        self.table[: x.shape[1]] = freqs.cos()
        x = self.embed(x) + self.table[: x.shape[1]].to(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class FillsFromWeights(nn.Module):
    """A rotary table made of a frozen parameter at the first call, and a buffer that says how far; layers share it."""

    cached: torch.Tensor
    length: torch.Tensor

    def __init__(self, width: int = 32, longest: int = 128) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Linear(4, width), blocks(width), nn.Linear(width, 4)
        self.freqs = nn.Parameter(100 ** -torch.linspace(0, 1, width), requires_grad=False)
        self.register_buffer("cached", torch.zeros(longest, width), persistent=False)
        self.register_buffer("length", torch.tensor(0), persistent=False)

    def table(self, n: int) -> torch.Tensor:
        """Angles of n tokens."""
        if n <= self.length.item():
            return self.cached[:n].detach()
        angles = torch.arange(n, device=self.freqs.device).type(self.freqs.dtype)[:, None] * self.freqs
        self.cached[:n] = angles.detach()
        self.length.copy_(torch.tensor(n))
        return angles

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, tokens, 4]."""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x + self.table(x.shape[1]).sin())
        return self.head(x)
