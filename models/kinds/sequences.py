"""What mixes along the sequence without attention: convolutions, linear layers over it, scans."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .parts import blocks, mlp


class ConvolvedTokens(nn.Module):
    """Two convolutions along the tokens in every block."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Linear(4, width), blocks(width), nn.Linear(width, 4)
        self.convs = nn.ModuleList(
            nn.Sequential(nn.Conv1d(width, width, 5, padding=2), nn.SiLU(), nn.Conv1d(width, width, 3, padding=1))
            for _ in range(3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, tokens, 4]."""
        x = self.embed(x)
        for block, conv in zip(self.blocks, self.convs, strict=True):
            x = block(x + conv(x.mT).mT)
        return self.head(x)


class MixerLayers(nn.Module):
    """Linear layers over the sequence in place of attention."""

    def __init__(self, width: int = 32, tokens: int = 64) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, width), nn.Linear(width, 4)
        self.across = nn.ModuleList(mlp(tokens, 2) for _ in range(3))
        self.within = nn.ModuleList(mlp(width) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, tokens, 4]."""
        x = self.embed(x)
        for across, within in zip(self.across, self.within, strict=True):
            x = x + across(F.layer_norm(x, x.shape[-1:]).mT).mT
            x = x + within(F.layer_norm(x, x.shape[-1:]))
        return self.head(x)


class StateSpace(nn.Module):
    """A selective state-space model: a loop over tokens with a state, as in code without kernels."""

    def __init__(self, width: int = 32, states: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.states, self.embed, self.head = states, nn.Linear(4, width), nn.Linear(width, 4)
        self.inner = nn.ModuleList(nn.Linear(width, 2 * width + 2 * states) for _ in range(depth))
        self.rates, self.mlps = nn.Parameter(torch.rand(width, states)), nn.ModuleList(mlp(width) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, tokens, 4]."""
        x = self.embed(x)
        width = x.shape[-1]
        for inner, net in zip(self.inner, self.mlps, strict=True):
            u, dt, b, c = inner(x).split([width, width, self.states, self.states], dim=-1)
            dt = F.softplus(dt)[..., None]
            decay, drive = torch.exp(-dt * self.rates.exp()), dt * b[:, :, None] * u[..., None]
            h, out = torch.zeros_like(drive[:, 0]), []
            for n in range(x.shape[1]):
                h = decay[:, n] * h + drive[:, n]
                out.append((h * c[:, n, None]).sum(-1))
            x = x + torch.stack(out, dim=1)
            x = x + net(x)
        return self.head(x)


class Recurrent(nn.Module):
    """A GRU in front of the blocks and an LSTM that goes both ways behind them, as speech models have."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Linear(4, width), blocks(width), nn.Linear(width, 4)
        self.before = nn.GRU(width, width, batch_first=True)
        self.behind = nn.LSTM(width, width // 2, batch_first=True, bidirectional=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, tokens, 4]."""
        x = self.embed(x)
        x = x + self.before(x)[0]
        for block in self.blocks:
            x = block(x)
        return self.head(x + self.behind(x)[0])


class CumulativeScan(nn.Module):
    """Gated linear recurrence by cumulative sums in log space, both ways."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, width), nn.Linear(width, 4)
        self.inner = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(3))
        self.mlps = nn.ModuleList(mlp(width) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, tokens, 4]."""
        x = self.embed(x)
        for number, (inner, net) in enumerate(zip(self.inner, self.mlps, strict=True)):
            y = x.flip(1) if number % 2 else x
            gate, value = inner(y).chunk(2, dim=-1)
            total = torch.cumsum(F.logsigmoid(gate + 6), dim=1)
            y = torch.exp(total) * torch.cumsum(value * torch.exp(-total), dim=1) * 0.1
            x = x + (y.flip(1) if number % 2 else y)
            x = x + net(x)
        return self.head(x)
