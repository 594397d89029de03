"""Models whose batch is found in integers only."""

from __future__ import annotations

import torch
from torch import nn

from .parts import Timestep, blocks


class MaskedTokens(nn.Module):
    """A diffusion model of words: its only input are their numbers."""

    def __init__(self, width: int = 32, words: int = 100) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(64, width)
        self.blocks, self.head = blocks(width), nn.Linear(width, words)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Numbers of words [batch, tokens]."""
        x = self.words(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class TokensAndStep(nn.Module):
    """Codes of images, a class and a step, all integers; masked codes are found by comparing."""

    def __init__(self, width: int = 32, codes: int = 128) -> None:
        super().__init__()
        self.codes, self.classes, self.steps = (nn.Embedding(n, width) for n in (codes + 1, 10, 1000))
        self.places = nn.Parameter(torch.randn(1, 64, width))
        self.blocks, self.head, self.mask = blocks(width), nn.Linear(width, codes), codes

    def forward(self, codes: torch.Tensor, label: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """Codes [batch, height, width], classes [batch], steps [batch]."""
        flat = codes.flatten(1)
        x = torch.cat([self.classes(label)[:, None], self.codes(flat) + self.places], dim=1)
        x = x + self.steps(step)[:, None]
        for block in self.blocks:
            x = block(x)
        logits = self.head(x[:, 1:])
        known = torch.nn.functional.one_hot(flat.clamp(max=self.mask - 1), self.mask).to(logits.dtype)
        return torch.where((flat == self.mask)[..., None], logits, 20 * known).mT.unflatten(2, codes.shape[1:])


class PackedSamples(nn.Module):
    """Samples of several lengths in one sequence, told apart by a mask: there is no batch to be divided."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Linear(4, width), blocks(width), nn.Linear(width, 4)
        self.time = Timestep(width)

    def forward(self, x: torch.Tensor, sample: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """All tokens [tokens, 4], the sample of each [tokens], timesteps [samples]."""
        mask = (sample[:, None] == sample[None, :])[None, None]
        x = (self.embed(x) + self.time(t)[sample])[None]
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x)[0]
