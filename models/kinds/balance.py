"""Streams with padding, short streams beside long ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .parts import Attention, Block, blocks


class PaddedStream(nn.Module):
    """80 tokens are padded to 256 for the blocks."""

    def __init__(self, width: int = 32, tokens: int = 256) -> None:
        super().__init__()
        self.tokens, self.embed = tokens, nn.Linear(4, width)
        self.blocks, self.head = blocks(width), nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, tokens, 4]."""
        n = x.shape[1]
        x = F.pad(self.embed(x), (0, 0, 0, self.tokens - n))
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, :n])


class RefinedStream(nn.Module):
    """Layers before the padding, too, and what is padded is a learnt token."""

    def __init__(self, width: int = 32, tokens: int = 192) -> None:
        super().__init__()
        self.tokens, self.embed, self.before, self.blocks = tokens, nn.Linear(4, width), Block(width), blocks(width)
        self.fill, self.head = nn.Parameter(torch.randn(width)), nn.Linear(width, 4)

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, tokens, 4], behind text [batch, words, width]."""
        n, missing = x.shape[1], self.tokens - x.shape[1]
        x = self.before(self.embed(x))
        x = torch.cat([text, x, self.fill.expand(len(x), missing, -1)], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, text.shape[1] : text.shape[1] + n])


class MaskedText(nn.Module):
    """Text padded to 256 words, of which a mask leaves few: refined by layers of its own, then joined."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.head, self.text = nn.Linear(4, width), nn.Linear(width, 4), blocks(width, 2)
        self.joint = blocks(width)

    def forward(self, x: torch.Tensor, words: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, tokens, 4], words [batch, words, width] with a mask [batch, words]."""
        keep = mask.bool()[:, None, None]
        for block in self.text:
            words = block(words, keep)
        keep = F.pad(keep, (0, x.shape[1]), value=True)
        x = torch.cat([words, self.embed(x)], dim=1)
        for block in self.joint:
            x = block(x, keep)
        return self.head(x[:, words.shape[1] :])


class SoundAndPicture(nn.Module):
    """16 tokens of sound and 240 of picture: each attends to itself and to the other."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.sound_in, self.picture_in = nn.Linear(4, width), nn.Linear(4, width)
        self.sound, self.picture = blocks(width), blocks(width)
        self.hear, self.see = (nn.ModuleList(Attention(width) for _ in range(3)) for _ in range(2))
        self.sound_out, self.picture_out = nn.Linear(width, 4), nn.Linear(width, 4)

    def forward(self, sound: torch.Tensor, picture: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both [batch, tokens, 4]."""
        s, p = self.sound_in(sound), self.picture_in(picture)
        for own, other, hear, see in zip(self.sound, self.picture, self.hear, self.see, strict=True):
            s, p = own(s), other(p)
            s, p = s + see(s, p), p + hear(p, s)
        return self.sound_out(s), self.picture_out(p)
