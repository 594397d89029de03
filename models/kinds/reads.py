"""Python reads what only the data decide."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .parts import Timestep, blocks, mlp


class SymmetricPairs(nn.Module):
    """Asserts that its input, pairs of residues, is symmetric."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Linear(4, width), blocks(width), nn.Linear(width, 4)

    def forward(self, x: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, tokens, 4], a bias of attention [tokens, tokens]."""
        sym = pairs + pairs.mT
        assert torch.allclose(sym, sym.mT), "pairs must be symmetric"
        x = self.embed(x)
        for block in self.blocks:
            assert not torch.isnan(x).any()
            x = block(x, sym)
        return self.head(x)


class FiniteOnly(nn.Module):
    """Raises an error of its own where its input, or what a layer makes, is not finite."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.time, self.blocks = nn.Linear(4, width), Timestep(width), blocks(width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Latents [batch, 4, height, width]."""
        if not torch.isfinite(x).all() or x.abs().max() > 1e4:
            raise ValueError("latents must be finite and of order one")
        tokens = self.embed(x.flatten(2).mT) + self.time(t)[:, None]
        for block in self.blocks:
            tokens = block(tokens)
            if tokens.isnan().any().item():
                raise RuntimeError(f"a block of {len(self.blocks)} gave NaN at {t}")
        return self.head(tokens).mT.unflatten(2, x.shape[2:])


class LibraryDecoder(nn.Module):
    """`nn.TransformerDecoder`, whose mask is kept as a parameter: it asks whether that is causal."""

    def __init__(self, width: int = 32, tokens: int = 64) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(width, 4, 4 * width, batch_first=True, norm_first=True, dropout=0.0)
        self.embed, self.decoder, self.head = nn.Linear(4, width), nn.TransformerDecoder(layer, 3), nn.Linear(width, 4)
        self.mask = nn.Parameter(nn.Transformer.generate_square_subsequent_mask(tokens), requires_grad=False)

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Actions [batch, tokens, 4]; text [batch, words, width]."""
        return self.head(self.decoder(self.embed(x), text, tgt_mask=self.mask))


class ExtraForNoisy(nn.Module):
    """Tokens noisier than others get a network more, if there are any."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Linear(4, width), blocks(width), nn.Linear(width, 4)
        self.extra = mlp(width)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, tokens, 4], each with its own timestep [batch, tokens]."""
        noisy = t > 0.5
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
            if noisy.any():
                x[noisy] += self.extra(x[noisy])
        return self.head(x)


class NoisyAndClean(nn.Module):
    """Noisy tokens and clean ones have a network each, in the model's own forward, if there are any."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Linear(4, width), blocks(width), nn.Linear(width, 4)
        self.nets = nn.ModuleList(mlp(width) for _ in range(2))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, tokens, 4], each with its own timestep [batch, tokens]."""
        x = self.embed(x)
        for block in self.blocks:
            x, out = block(x), torch.zeros_like(x)
            for net, chosen in zip(self.nets, (t > 0.5, t <= 0.5), strict=True):
                if chosen.sum() == 0:
                    continue
                out[chosen] = net(F.layer_norm(x[chosen], x.shape[-1:]))
            x = x + out
        return self.head(x)


class RoutedExpert(nn.Module):
    """Two experts, each of which sees the tokens that a router gives it, if any."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(width, 2), nn.ModuleList(mlp(width) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, tokens, width]."""
        score, choice = F.softmax(self.router(x), dim=-1).max(dim=-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            chosen = choice == number
            if not chosen.any():
                continue
            out[chosen] = expert(x[chosen]) * score[chosen, None]
        return out


class Routed(nn.Module):
    """Attention, then experts, in one class: what cannot be known is inside of the smaller module."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, width), nn.Linear(width, 4)
        self.blocks, self.experts = blocks(width), nn.ModuleList(RoutedExpert(width) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, tokens, 4]."""
        x = self.embed(x)
        for block, expert in zip(self.blocks, self.experts, strict=True):
            x = x + expert(block(x))
        return self.head(x)


class ChunkedLayers(nn.Module):
    """Layers called chunk by chunk, on a tree of arguments that is told apart by the exact types in it."""

    def __init__(self, width: int = 32, rows: int = 48) -> None:
        super().__init__()
        self.embed, self.head, self.rows = nn.Linear(4, width), nn.Linear(width, 4), rows
        self.blocks, self.mlps = blocks(width), nn.ModuleList(mlp(width) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, tokens, 4]."""
        x = self.embed(x)
        for block, layer in zip(self.blocks, self.mlps, strict=True):
            x = block(x)
            flat = x.flatten(0, 1)
            given, out = {"x": flat, "scales": [flat.new_ones(len(flat), 1)]}, torch.zeros_like(flat)
            for start in range(0, len(out), self.rows):
                chunk = self.mapped(given, slice(start, start + self.rows))
                out[start : start + self.rows] = layer(chunk["x"]) * chunk["scales"][0]
            x = x + out.view_as(x)
        return self.head(x)

    def mapped(self, tree: Any, rows: slice) -> Any:
        """These rows of each tensor in a tree."""
        if type(tree) is dict:
            return {key: self.mapped(entry, rows) for key, entry in tree.items()}
        if type(tree) is list:
            return [self.mapped(entry, rows) for entry in tree]
        if type(tree) is torch.Tensor:
            return tree[rows]
        raise ValueError(f"{type(tree)} is not supported")
