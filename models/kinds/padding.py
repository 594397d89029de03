"""Text that is padded, and the ways in which models say which words are real."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .parts import Attention, Block, blocks, mlp


class LengthsOfText(nn.Module):
    """Cross-attention to padded text; how long it is comes as numbers, and what is behind that is hidden by -inf."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.head, self.text = nn.Linear(4, width), nn.Linear(width, 4), mlp(width)
        self.blocks, self.cross = blocks(width), nn.ModuleList(Attention(width) for _ in range(3))

    def forward(self, x: torch.Tensor, words: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, tokens, 4], words [batch, words, width], lengths [batch]."""
        real = torch.arange(words.shape[1], device=x.device) < lengths[:, None]
        bias = torch.zeros(real.shape, device=x.device).masked_fill(~real, float("-inf"))[:, None, None]
        x, words = self.embed(x), self.text(words)
        for block, cross in zip(self.blocks, self.cross, strict=True):
            x = block(x)
            x = x + cross(x, words, bias)
        return self.head(x)


class PooledText(nn.Module):
    """The mean of the real words modulates all tokens; words see real words only, and are joined behind the tokens."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.head, self.pool = nn.Linear(4, width), nn.Linear(width, 4), mlp(width)
        self.text, self.joint = Block(width), blocks(width)

    def forward(self, x: torch.Tensor, words: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, tokens, 4], words [batch, words, width] with a mask [batch, words]."""
        weight = mask.to(words.dtype)[..., None]
        pooled = (words * weight).sum(1) / weight.sum(1)
        real = mask.bool()
        pairs = real[:, None, :, None] & real[:, None, None]
        pairs[..., 0] = True
        words = self.text(words, pairs)
        n, keep = x.shape[1], F.pad(real, (x.shape[1], 0), value=True)[:, None, None]
        x = torch.cat([self.embed(x) + self.pool(pooled)[:, None], words], dim=1)
        for block in self.joint:
            x = block(x, keep)
        return self.head(x[:, :n])


class HiddenByLowest(nn.Module):
    """The lowest number that there is hides padding, in the middle of a joint stream; scores are written out."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.embed, self.head = heads, nn.Linear(4, width), nn.Linear(width, 4)
        self.mark, self.qkv = nn.Parameter(torch.randn(8, width)), nn.ModuleList()
        self.qkv.extend(nn.Linear(width, 3 * width) for _ in range(3))
        self.mlps = nn.ModuleList(mlp(width) for _ in range(3))

    def forward(self, x: torch.Tensor, words: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, tokens, 4], words [batch, words, width] with a mask [batch, words]."""
        n, batch = x.shape[1], len(x)
        x = torch.cat([self.mark.expand(batch, -1, -1), words, self.embed(x)], dim=1)
        bias = F.pad((1 - mask.to(x.dtype)) * torch.finfo(x.dtype).min, (len(self.mark), n))[:, None, None]
        for qkv, net in zip(self.qkv, self.mlps, strict=True):
            parts = qkv(F.layer_norm(x, x.shape[-1:])).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            q, k, v = parts
            scores = q @ k.mT * q.shape[-1] ** -0.5 + bias
            x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
            x = x + net(x)
        return self.head(x[:, -n:])


class HiddenByThousands(LengthsOfText):
    """A number that may leave something of what it hides, if only scores were large enough: padding stays."""

    def forward(self, x: torch.Tensor, words: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, tokens, 4], words [batch, words, width], lengths [batch]."""
        real = torch.arange(words.shape[1], device=x.device) < lengths[:, None]
        bias = ((1 - real.to(x.dtype)) * -10000.0)[:, None, None]
        x, words = self.embed(x), self.text(words)
        for block, cross in zip(self.blocks, self.cross, strict=True):
            x = block(x)
            x = x + cross(x, words, bias)
        return self.head(x)


class ReturnedText(nn.Module):
    """Words are returned too, also those that nobody sees: padding stays."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.head, self.joint = nn.Linear(4, width), nn.Linear(width, 4), blocks(width)

    def forward(self, x: torch.Tensor, words: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [batch, tokens, 4], words [batch, words, width] with a mask [batch, words]."""
        n, keep = words.shape[1], F.pad(mask.bool(), (0, x.shape[1]), value=True)[:, None, None]
        x = torch.cat([words, self.embed(x)], dim=1)
        for block in self.joint:
            x = block(x, keep)
        return self.head(x[:, n:]), x[:, :n]
