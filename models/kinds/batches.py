"""Models whose batch is found in integers only, or packed into one sequence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .parts import Timestep, blocks, mlp


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


class PackedLengths(PackedSamples):
    """The same by the samples' lengths, which Python reads."""

    def forward(self, x: torch.Tensor, lengths: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """All tokens [tokens, 4], how many of each sample [samples], timesteps [samples]."""
        samples = torch.arange(len(lengths), device=x.device)
        return super().forward(x, samples.repeat_interleave(torch.tensor(lengths.tolist(), device=x.device)), t)


def packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, queries: list[int], keys: list[int]) -> torch.Tensor:
    """Attention [tokens, heads, width] of sequences of these lengths that follow each other, as kernels have it."""
    parts = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
    made = (F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in part)) for part in parts)
    return torch.cat([x[0].transpose(0, 1) for x in made])


class PackedText(nn.Module):
    """The words of all samples in one sequence, without their padding; images attend to them sample by sample."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.embed, self.text = heads, nn.Linear(4, width), nn.Linear(32, width)
        self.head = nn.Linear(width, 4)
        self.time, self.blocks = Timestep(width), blocks(width)
        self.q, self.kv = (nn.ModuleList(nn.Linear(width, n * width) for _ in self.blocks) for n in (1, 2))

    def forward(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, tokens, 4], timesteps [batch], words [batch, words, 32], which of them there are."""
        lengths = mask.sum(dim=1).tolist()
        words = self.text(text.flatten(0, 1)[mask.flatten()])
        x = self.embed(x) + self.time(t)[:, None]
        for block, to_q, to_kv in zip(self.blocks, self.q, self.kv, strict=True):
            x = block(x)
            q = to_q(x).flatten(0, 1).unflatten(-1, (self.heads, -1))
            k, v = to_kv(words).unflatten(-1, (2, self.heads, -1)).unbind(1)
            x = x + packed(q, k, v, [x.shape[1]] * len(x), lengths).reshape(x.shape)
        return self.head(x)


class PackedJoint(nn.Module):
    """Image and words of each sample, one sample behind the other; what pads the words attends to itself."""

    def __init__(self, width: int = 32, heads: int = 4, depth: int = 3) -> None:
        super().__init__()
        self.heads, self.embed, self.text = heads, nn.Linear(4, width), nn.Linear(32, width)
        self.head = nn.Linear(width, 4)
        self.time, self.mlps = Timestep(width), nn.ModuleList(mlp(width) for _ in range(depth))
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(depth))

    def forward(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """As of `PackedText`."""
        tokens, words = x.shape[1], text.shape[1]
        lengths = [n for used in mask.sum(dim=1).tolist() for n in (tokens + used, words - used)]
        x = torch.cat([self.embed(x) + self.time(t)[:, None], self.text(text)], dim=1)
        for qkv, net in zip(self.qkv, self.mlps, strict=True):
            q, k, v = qkv(x).flatten(0, 1).unflatten(-1, (3, self.heads, -1)).unbind(1)
            x = x + packed(q, k, v, lengths, lengths).reshape(x.shape)
            x = x + net(F.layer_norm(x, x.shape[-1:]))
        return self.head(x[:, :tokens])


class MaskThroughExpand(nn.Module):
    """Atoms that there are not; rows of the mask that allow nothing are opened, by a write to an expanded tensor."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.embed, self.blocks, self.head, self.heads = nn.Linear(4, width), blocks(width), nn.Linear(width, 4), heads

    def forward(self, x: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        """Atoms [batch, atoms, 4], which of them there are [batch, atoms]."""
        n = x.shape[1]
        x = self.embed(x)
        for block in self.blocks:
            mask = (there[:, None, :, None] & there[:, None, None, :]).expand(-1, self.heads, n, n)
            mask[mask.sum(-1) == 0] = True
            x = block(x, mask)
        return self.head(x) * there[..., None]


class PackedBatch(nn.Module):
    """A batch as one sequence while it attends: of each sample its image and what it has of text, and the rest of text
    by itself."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.embed, self.text, self.head = nn.Linear(4, width), nn.Linear(32, width), nn.Linear(width, 4)
        self.qkv, self.heads = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(3)), heads
        self.mlps, self.time = nn.ModuleList(mlp(width) for _ in range(3)), Timestep(width)

    def forward(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Image [batch, tokens, 4], timesteps [batch], text [batch, words, 32], which words there are."""
        tokens, words = x.shape[1], text.shape[1]
        lengths = [length for there in mask.sum(dim=1).tolist() for length in (tokens + there, words - there)]
        x = torch.cat([self.embed(x), self.text(text)], dim=1) + self.time(t)[:, None]
        for qkv, layer in zip(self.qkv, self.mlps, strict=True):
            parts = qkv(x).flatten(0, 1).unflatten(-1, (3, self.heads, -1)).unbind(1)
            samples = zip(*(part.split(lengths) for part in parts), strict=True)
            out = [F.scaled_dot_product_attention(*(p.transpose(0, 1)[None] for p in one))[0] for one in samples]
            x = x + torch.cat(out, dim=1).transpose(0, 1).flatten(1).view_as(x)
            x = x + layer(x)
        return self.head(x[:, :tokens])
