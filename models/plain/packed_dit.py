"""A DiT of packed images of any size, after Lumina-Next (Zhuo et al., arXiv 2406.18583) and Z-Image
(arXiv 2511.22699).

Inputs and outputs are lists, one image and one text a sample; all tokens of all samples make one sequence without
padding; `cu_seqlens` marks where samples begin; rotary positions over (text, row, column) are complex numbers.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import nn


def rotary_table(ids: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
    """Complex [tokens, sum(axes) / 2] of integer positions [tokens, len(axes)]."""
    parts = []
    for column, dim in enumerate(axes):
        freqs = 1.0 / 10000.0 ** (torch.arange(0, dim, 2, dtype=torch.float32, device=ids.device) / dim)
        angles = torch.outer(ids[:, column].float(), freqs)
        parts.append(torch.polar(torch.ones_like(angles), angles))
    return torch.cat(parts, dim=-1)


def apply_rotary(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotate [tokens, heads, head width] in the complex plane."""
    turned = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2)) * table[:, None, :]
    return torch.view_as_real(turned).flatten(-2).type_as(x)


def varlen_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Attention of packed [tokens, heads, head width] within each sequence; keys and values may have fewer heads."""
    out = torch.empty_like(q)
    bounds = cu_seqlens.tolist()
    for start, end in itertools.pairwise(bounds):
        query, key, value = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
        out[start:end] = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)[0].transpose(0, 1)
    return out


class Attention(nn.Module):
    """Grouped queries, normalised queries and keys."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.wq, self.wo = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.q_norm, self.k_norm = nn.RMSNorm(self.head_dim), nn.RMSNorm(self.head_dim)

    def forward(self, x: torch.Tensor, table: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """Packed tokens [tokens, width]."""
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)) for layer in (self.wq, self.wk, self.wv))
        q, k = apply_rotary(self.q_norm(q), table), apply_rotary(self.k_norm(k), table)
        x = self.wo(varlen_attention(q, k, v, cu_seqlens).flatten(1))
        return x


class Block(nn.Module):
    """Sandwich norms, tanh gates, SwiGLU; modulation is looked up per token by the sample it belongs to."""

    def __init__(self, width: int, heads: int, kv_heads: int, modulated: bool = True) -> None:
        super().__init__()
        self.attention = Attention(width, heads, kv_heads)
        hidden = int(8 * width / 3)
        self.w1, self.w3 = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.attention_norm1, self.attention_norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.ffn_norm1, self.ffn_norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.adaLN_modulation = nn.Linear(width, 4 * width) if modulated else None

    def forward(
        self, x: torch.Tensor, table: torch.Tensor, cu_seqlens: torch.Tensor, c: torch.Tensor | None = None,
        sample: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Packed tokens [tokens, width]; conditions [samples, width]; `sample` [tokens] says whose token it is."""
        scale_a, gate_a, scale_m, gate_m = 0.0, 1.0, 0.0, 1.0
        if self.adaLN_modulation is not None and c is not None:
            scale_a, gate_a, scale_m, gate_m = self.adaLN_modulation(F.silu(c))[sample].chunk(4, dim=-1)
            gate_a, gate_m = gate_a.tanh(), gate_m.tanh()
        y = self.attention(self.attention_norm1(x) * (1 + scale_a), table, cu_seqlens)
        x = x + gate_a * self.attention_norm2(y)
        y = self.ffn_norm1(x) * (1 + scale_m)
        x = x + gate_m * self.ffn_norm2(self.w2(F.silu(self.w1(y)) * self.w3(y)))
        return x


class PackedDiT(nn.Module):
    """Velocities of a list of latent images [channels, height, width], each with a text of its own length."""

    def __init__(
        self, channels: int = 16, patch: int = 2, width: int = 2304, depth: int = 26, refiners: int = 2,
        heads: int = 24, kv_heads: int = 8, axes: tuple[int, ...] = (32, 32, 32), text_dim: int = 2304,
    ) -> None:  # fmt: skip
        super().__init__()
        self.patch, self.axes = patch, axes
        self.x_embedder, self.cap_norm = nn.Linear(channels * patch**2, width), nn.RMSNorm(text_dim)
        self.cap_embedder = nn.Linear(text_dim, width)
        self.t_embedder = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.text_refiner = nn.ModuleList([Block(width, heads, kv_heads, modulated=False) for _ in range(refiners)])
        self.layers = nn.ModuleList([Block(width, heads, kv_heads) for _ in range(depth)])
        self.norm, self.out = nn.RMSNorm(width), nn.Linear(width, channels * patch**2)

    def patchify(self, image: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Patches [tokens, channels * patch * patch] and positions [tokens, 3]; the image comes after `start`."""
        c, h, w = image.shape
        p = self.patch
        patches = image.view(c, h // p, p, w // p, p).permute(1, 3, 2, 4, 0).flatten(2).flatten(0, 1)
        rows, columns = torch.meshgrid(torch.arange(h // p), torch.arange(w // p), indexing="ij")
        ids = torch.stack([torch.full_like(rows, start), rows, columns], dim=-1).flatten(0, 1)
        return patches, ids.to(image.device)

    def forward(self, x: list[torch.Tensor], t: torch.Tensor, caps: list[torch.Tensor]) -> list[torch.Tensor]:
        """Images, times [samples], texts [tokens, text_dim]."""
        device = x[0].device
        half = torch.arange(128, device=device, dtype=torch.float32)
        angles = 1000.0 * t[:, None].float() * 10000 ** (-half / 128)
        c = self.t_embedder(torch.cat([angles.cos(), angles.sin()], dim=1).to(x[0].dtype))

        texts = self.cap_embedder(self.cap_norm(torch.cat(caps)))
        text_ids = [F.pad(torch.arange(len(cap), device=device)[:, None], (0, 2)) for cap in caps]
        lengths = torch.tensor([len(cap) for cap in caps])
        table, bounds = rotary_table(torch.cat(text_ids), self.axes), F.pad(lengths.cumsum(0), (1, 0))
        for layer in self.text_refiner:
            texts = layer(texts, table, bounds)

        patchified = [self.patchify(image, len(cap)) for image, cap in zip(x, caps, strict=True)]
        patches, image_ids = zip(*patchified, strict=True)
        images = self.x_embedder(torch.cat(patches)).split([len(part) for part in patches])
        sequences = [part for pair in zip(texts.split(lengths.tolist()), images, strict=True) for part in pair]
        ids = torch.cat([part for pair in zip(text_ids, image_ids, strict=True) for part in pair])
        totals = lengths + torch.tensor([len(part) for part in patches])
        sample = torch.repeat_interleave(torch.arange(len(x)), totals)
        table, bounds = rotary_table(ids, self.axes), F.pad(totals.cumsum(0), (1, 0))
        tokens = torch.cat(sequences)
        for layer in self.layers:
            tokens = layer(tokens, table, bounds, c, sample)

        outputs = []
        p = self.patch
        for image, cap, part in zip(x, caps, self.out(self.norm(tokens)).split(totals.tolist()), strict=True):
            channels, h, w = image.shape
            part = part[len(cap) :].view(h // p, w // p, p, p, channels)
            outputs.append(part.permute(4, 0, 2, 1, 3).reshape(channels, h, w))
        return outputs
