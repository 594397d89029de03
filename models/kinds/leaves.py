"""Submodules that cannot be captured, and what they return."""

from __future__ import annotations

import torch
from torch import nn

from .parts import Timestep, blocks, mlp


class Result:
    """What a layer made, and what it says of it."""

    def __init__(self, tokens: torch.Tensor, load: torch.Tensor, kind: str) -> None:
        self.tokens, self.load, self.kind = tokens, load, kind


class Chooser(nn.Module):
    """One of two networks for each token, as a loop over what was chosen; returns an object."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(width, 2), nn.ModuleList(mlp(width) for _ in range(2))

    def forward(self, x: torch.Tensor) -> Result:
        """Tokens [batch, tokens, width]."""
        choice = self.router(x).argmax(-1)
        out = torch.zeros_like(x)
        for number in choice.unique().tolist():
            where = choice == number
            out[where] = self.experts[number](x[where])
        return Result(out, choice.float(), "routed")


class ObjectLeaves(nn.Module):
    """Layers return objects."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.head, self.blocks = nn.Linear(4, width), nn.Linear(width, 4), blocks(width)
        self.choosers = nn.ModuleList(Chooser(width) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, tokens, 4]."""
        x = self.embed(x)
        for block, chooser in zip(self.blocks, self.choosers, strict=True):
            x = block(x)
            found = chooser(x)
            assert found.kind == "routed"
            x = x + found.tokens * (1 + found.load[..., None])
        return self.head(x)


class Steps(nn.Module):
    """As many steps as the largest entry says: of rows, one by one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rows [rows, width]; there must be some."""
        for _ in range(1 + int(x.detach().abs().max().clamp(max=1).item() * 0)):
            x = self.linear(x).tanh()
        return x


class FewRows(nn.Module):
    """A leaf of three rows, which four ranks share."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.head, self.blocks = nn.Linear(4, width), nn.Linear(width, 4), blocks(width)
        self.steps, self.time = Steps(width), Timestep(width)

    def forward(self, x: torch.Tensor, cameras: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, tokens, 4] of three cameras [batch, 3, 4], one after the other."""
        seen = self.steps(self.embed(cameras).flatten(0, 1)).unflatten(0, cameras.shape[:2])
        x = (self.embed(x).unflatten(1, (3, -1)) + seen[:, :, None]).flatten(1, 2) + self.time(t)[:, None]
        for block in self.blocks:
            x = block(x)
        return self.head(x)
