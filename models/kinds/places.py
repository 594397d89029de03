"""Tokens put elsewhere by known numbers."""

from __future__ import annotations

import torch
from torch import nn

from .parts import Attention, blocks, mlp


class ImagesInText(nn.Module):
    """Image tokens are written where the text has places for them."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.words, self.embed = nn.Embedding(100, width), nn.Linear(4, width)
        self.blocks, self.head = blocks(width), nn.Linear(width, 4)

    def forward(self, ids: torch.Tensor, image: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """Words [batch, tokens]; image tokens [batch, places, 4] and where they stand [batch, tokens], True."""
        x = self.words(ids)
        x[where] = self.embed(image).flatten(0, 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x[where]).view_as(image)


class Interleaved(nn.Module):
    """Tokens of two views, written by turns into one sequence."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Linear(4, width), blocks(width), nn.Linear(width, 4)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Both [batch, tokens, 4]."""
        n = left.shape[1]
        odd = torch.arange(n, device=left.device) * 2 + 1
        x = torch.zeros(left.shape[0], 2 * n, self.head.in_features, device=left.device, dtype=left.dtype)
        x[:, odd - 1], x[:, odd] = self.embed(left), self.embed(right)
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, odd - 1]) + self.head(x[:, odd])


class ByModality(nn.Module):
    """Tokens sorted by kind, a network for each kind, then sorted back."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, width), nn.Linear(width, 4)
        self.attention = nn.ModuleList(Attention(width) for _ in range(3))
        self.mlps = nn.ModuleList(nn.ModuleList(mlp(width) for _ in range(2)) for _ in range(3))

    def forward(self, x: torch.Tensor, kind: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, tokens, 4], the kind of each [tokens]: 0 or 1."""
        order = torch.argsort(kind, stable=True)
        back, sizes = torch.argsort(order), torch.bincount(kind, minlength=2).tolist()
        x = self.embed(x)
        for attention, mlps in zip(self.attention, self.mlps, strict=True):
            x = x + attention(x)
            parts = x[:, order].split(sizes, dim=1)
            x = x + torch.cat([net(part) for net, part in zip(mlps.children(), parts, strict=True)], dim=1)[:, back]
        return self.head(x)


class Scanned(nn.Module):
    """Every other layer sees the tokens column by column; a permutation and its inverse stand between them."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Linear(4, width), blocks(width, 4), nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Latents [batch, 4, rows, columns]."""
        rows, columns = x.shape[2:]
        order = torch.arange(rows * columns, device=x.device).view(rows, columns).t().flatten()
        back = torch.argsort(order)
        tokens = self.embed(x.flatten(2).mT)
        for number, block in enumerate(self.blocks):
            tokens = block(tokens[:, order])[:, back] if number % 2 else block(tokens)
        return self.head(tokens).mT.unflatten(2, (rows, columns))


class TextsOfLengths(nn.Module):
    """Behind texts of different lengths images begin at different places of the joint stream."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Linear(4, width), blocks(width), nn.Linear(width, 4)

    def forward(self, x: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, tokens, 4], words [batch, words, width] and how many of them count, as a mask."""
        lengths, n = mask.sum(1).tolist(), x.shape[1]
        joint = torch.zeros(len(x), max(lengths) + n, text.shape[2], device=x.device, dtype=x.dtype)
        keep = torch.zeros(joint.shape[:2], device=x.device, dtype=torch.bool)
        for sample, length in enumerate(lengths):
            joint[sample, :length] = text[sample, :length]
            joint[sample, length : length + n] = self.embed(x[sample])
            keep[sample, : length + n] = True
        for block in self.blocks:
            joint = block(joint, keep[:, None, None])
        joint = self.head(joint)
        return torch.stack([joint[sample, length : length + n] for sample, length in enumerate(lengths)])


class PiecesOfSamples(nn.Module):
    """A list of images of one size, each behind its own text, joined sample by sample and padded."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.head, self.before = nn.Linear(4, width), nn.Linear(width, 4), blocks(width, 1)
        self.place, self.blocks = nn.Embedding(200, width), blocks(width)

    def forward(self, x: list[torch.Tensor], text: list[torch.Tensor]) -> list[torch.Tensor]:
        """Tokens [tokens, 4] and words [words, width] of each sample."""
        images = torch.stack([self.embed(one) for one in x])
        for block in self.before:
            images = block(images)
        pairs = list(zip(text, images.unbind(0), strict=True))
        pad = torch.nn.utils.rnn.pad_sequence
        joint = pad([torch.cat([words, tokens]) for words, tokens in pairs], batch_first=True)
        places = [self.place(torch.arange(len(words) + len(tokens), device=words.device)) for words, tokens in pairs]
        kept = [torch.ones(len(own), device=own.device, dtype=torch.bool) for own in places]
        joint, keep = joint + pad(places, batch_first=True), pad(kept, batch_first=True)
        for block in self.blocks:
            joint = block(joint, keep[:, None, None])
        return [self.head(one[len(words) : len(words) + len(x[0])]) for one, words in zip(joint, text, strict=True)]
