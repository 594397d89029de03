"""Causal video: chunks of frames attend to those before, of which the caller keeps keys and values."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .parts import blocks


class CausalVideo(nn.Module):
    """The chunk number `chunk`; a call on finished latents (`write`) leaves its keys and values with those before. It
    returns the caches that it was given, and notes in `note` how far they go."""

    def __init__(self, width: int = 32, tokens: int = 64) -> None:
        super().__init__()
        self.tokens, self.embed, self.blocks, self.head = (
            tokens,
            nn.Linear(4, width),
            blocks(width),
            nn.Linear(width, 4),
        )

    def forward(
        self, x: torch.Tensor, cache: list[dict[str, torch.Tensor]], note: dict[str, int], chunk: int, write: bool
    ) -> Any:
        """Tokens [batch, tokens, 4]; a block's cache has "k" and "v" [batch, heads, tokens of all chunks, width]."""
        note["cached"] = (chunk + write) * self.tokens
        x = self.embed(x)
        block: Any
        for block, one in zip(self.blocks, cache, strict=True):
            x = x + self.attention(block.attention, block.norm1(x), one, chunk * self.tokens, write)
            x = x + block.mlp(block.norm2(x))
        return self.head(x), cache

    def attention(
        self, layer: Any, x: torch.Tensor, cache: dict[str, torch.Tensor], before: int, write: bool
    ) -> torch.Tensor:
        """To what is `before` in the cache, and the chunk itself."""
        k, v = layer.kv(x).unflatten(-1, (2, layer.heads, -1)).permute(2, 0, 3, 1, 4)
        q, after = layer.q(x).unflatten(-1, (layer.heads, -1)).transpose(1, 2), before + self.tokens
        if write:
            cache["k"][:, :, before:after], cache["v"][:, :, before:after] = k, v
        k, v = torch.cat([cache["k"][:, :, :before], k], 2), torch.cat([cache["v"][:, :, :before], v], 2)
        out: torch.Tensor = layer.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out
