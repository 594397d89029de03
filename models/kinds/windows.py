"""Windows over tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .parts import Attention, blocks, mlp


class LocalKeys(nn.Module):
    """Blocks of queries see the keys around them: overlapping windows by pad and unfold."""

    def __init__(self, width: int = 32, block: int = 8, halo: int = 4) -> None:
        super().__init__()
        self.block, self.halo, self.heads = block, halo, 4
        self.embed, self.head = nn.Linear(4, width), nn.Linear(width, 4)
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(3))
        self.mlps = nn.ModuleList(mlp(width) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, tokens, 4]."""
        x = self.embed(x)
        reach = self.block + 2 * self.halo
        for qkv, net in zip(self.qkv, self.mlps, strict=True):
            q, k, v = qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            k, v = (F.pad(y, (0, 0, self.halo, self.halo)).unfold(2, reach, self.block).mT for y in (k, v))
            q = q.unflatten(2, (-1, self.block))
            out = F.scaled_dot_product_attention(q, k, v).flatten(2, 3)
            x = x + out.transpose(1, 2).flatten(2)
            x = x + net(x)
        return self.head(x)


class ShiftedWindows(nn.Module):
    """Attention in windows of an image, which every other layer shifts by half a window."""

    def __init__(self, width: int = 32, window: int = 4) -> None:
        super().__init__()
        self.window, self.embed, self.head = window, nn.Linear(4, width), nn.Linear(width, 4)
        self.attention = nn.ModuleList(Attention(width) for _ in range(4))
        self.mlps = nn.ModuleList(mlp(width) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Latents [batch, 4, rows, columns]."""
        w, x = self.window, self.embed(x.movedim(1, -1))
        b, rows, columns, _ = x.shape
        for number, (attention, net) in enumerate(zip(self.attention, self.mlps, strict=True)):
            shift = (number % 2) * (w // 2)
            y = torch.roll(x, (-shift, -shift), dims=(1, 2)) if shift else x
            y = y.view(b, rows // w, w, columns // w, w, -1).permute(0, 1, 3, 2, 4, 5).reshape(-1, w * w, y.shape[-1])
            y = attention(y).view(b, rows // w, columns // w, w, w, -1).permute(0, 1, 3, 2, 4, 5)
            y = y.reshape(b, rows, columns, -1)
            x = x + (torch.roll(y, (shift, shift), dims=(1, 2)) if shift else y)
            x = x + net(x)
        return self.head(x).movedim(-1, 1)


class Neighbourhood(nn.Module):
    """Every pixel attends to the 3 x 3 around it, by `F.unfold` of keys and values."""

    def __init__(self, width: int = 32, reach: int = 3) -> None:
        super().__init__()
        self.reach, self.embed, self.head = reach, nn.Conv2d(4, width, 1), nn.Conv2d(width, 4, 1)
        self.qkv = nn.ModuleList(nn.Conv2d(width, 3 * width, 1) for _ in range(3))
        self.mlps = nn.ModuleList(mlp(width) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Latents [batch, 4, rows, columns]."""
        x = self.embed(x)
        b, c, rows, columns = x.shape
        for qkv, net in zip(self.qkv, self.mlps, strict=True):
            q, k, v = qkv(x).chunk(3, dim=1)
            k, v = (F.unfold(y, self.reach, padding=self.reach // 2).view(b, c, -1, rows * columns) for y in (k, v))
            scores = (q.flatten(2)[:, :, None] * k).sum(1, keepdim=True) * c**-0.5
            x = x + (scores.softmax(2) * v).sum(2).view(b, c, rows, columns)
            x = x + net(x.movedim(1, -1)).movedim(-1, 1)
        return self.head(x)


class RelativeShift(nn.Module):
    """Scores by distance, brought to their places by `as_strided`, as in music transformers."""

    def __init__(self, width: int = 32, tokens: int = 64) -> None:
        super().__init__()
        self.heads, self.embed, self.head = 4, nn.Linear(4, width), nn.Linear(width, 4)
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(3))
        self.mlps = nn.ModuleList(mlp(width) for _ in range(3))
        self.distances = nn.Parameter(torch.randn(2 * tokens - 1, width // 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, tokens, 4]."""
        x = self.embed(x)
        b, n, _ = x.shape
        for qkv, net in zip(self.qkv, self.mlps, strict=True):
            q, k, v = qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            far = (q @ self.distances.mT).contiguous()  # [batch, heads, queries, distances]
            m = 2 * n - 1
            near = far.as_strided((b, self.heads, n, n), (self.heads * n * m, n * m, m - 1, 1), n - 1)
            scores = (q @ k.mT + near) * q.shape[-1] ** -0.5
            x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
            x = x + net(x)
        return self.head(x)


class PaddedShift(nn.Module):
    """The same by a pad and two views, as in the paper."""

    def __init__(self, width: int = 32, tokens: int = 64) -> None:
        super().__init__()
        self.heads, self.embed, self.head = 4, nn.Linear(4, width), nn.Linear(width, 4)
        self.blocks, self.q = blocks(width), nn.Linear(width, width)
        self.distances = nn.Parameter(torch.randn(tokens, width // 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, tokens, 4]."""
        x = self.embed(x)
        b, n, _ = x.shape
        for block in self.blocks:
            far = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) @ self.distances.mT
            bias = F.pad(far, (1, 0)).view(b, self.heads, n + 1, n)[:, :, 1:]
            x = block(x, bias.tril())
        return self.head(x)


class KeysOfHalves(nn.Module):
    """Windows of all samples in one batch: each attends to itself and half of its neighbours, which a table of zeros
    and ones brings to it from the halves of all windows of its sample."""

    def __init__(self, width: int = 32, window: int = 8) -> None:
        super().__init__()
        self.embed, self.head, self.window = nn.Linear(4, width), nn.Linear(width, 4), window
        self.q, self.kv = (nn.ModuleList(nn.Linear(width, n * width) for _ in range(2)) for n in (1, 2))
        self.mlps = nn.ModuleList(mlp(width) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, tokens, 4]."""
        batch, tokens, half = x.shape[0], x.shape[1], self.window // 2
        halves = torch.arange(tokens // half, device=x.device)
        places = (halves[None, :] - halves[::2, None] + 1).clamp(-1, 4) + 1  # of halves, for each window
        table = F.one_hot(places, 6)[..., 1:5].permute(1, 0, 2).flatten(1).to(x.dtype)
        x = self.embed(x).unflatten(1, (-1, self.window)).flatten(0, 1)
        for q, kv, layer in zip(self.q, self.kv, self.mlps, strict=True):
            near = torch.einsum("bjid,jk->bkid", x.view(batch, -1, half, x.shape[-1]), table)
            k, v = kv(near.reshape(len(x), 4 * half, -1)).unflatten(-1, (2, 4, -1)).permute(2, 0, 3, 1, 4)
            out = F.scaled_dot_product_attention(q(x).unflatten(-1, (4, -1)).transpose(1, 2), k, v)
            x = x + out.transpose(1, 2).flatten(2)
            x = x + layer(x)
        return self.head(x).view(batch, tokens, -1)
