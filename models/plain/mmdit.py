"""MMDiT: "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis" (Esser et al., arXiv 2403.03206).

Two streams with weights of their own and one attention; everything is small functions and einops; parameters of a
stream are looked up in a ModuleDict; the last block drops the text.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of [batch, heads, tokens, head width], as [batch, tokens, width]."""
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")


def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    """Root mean square norm over the last dimension."""
    rms = torch.rsqrt(torch.mean(x.float() ** 2, dim=-1, keepdim=True) + 1e-6)
    return (x * rms).to(x.dtype) * scale


def fourier(t: Tensor, dim: int) -> Tensor:
    """Timesteps [batch] to features [batch, dim]."""
    freqs = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = rearrange(1000.0 * t.float(), "b -> b 1") * rearrange(freqs, "f -> 1 f")
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def positions(dim: int, h: int, w: int, device: torch.device) -> Tensor:
    """Sine-cosine table [1, h * w, dim] for a grid of any size."""
    omega = 1.0 / 10000 ** (torch.arange(dim // 4, device=device) / (dim // 4))
    rows = repeat(torch.arange(h, device=device), "h -> (h w) 1", w=w) * omega
    columns = repeat(torch.arange(w, device=device), "w -> (h w) 1", h=h) * omega
    return torch.cat((rows.sin(), rows.cos(), columns.sin(), columns.cos()), dim=-1)[None]


class Stream(nn.Module):
    """What one stream has in a block; `pre_only` keeps what attention needs, and no more."""

    def __init__(self, dim: int, heads: int, pre_only: bool = False) -> None:
        super().__init__()
        self.heads, self.pre_only = heads, pre_only
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_scale, self.k_scale = nn.Parameter(torch.ones(dim // heads)), nn.Parameter(torch.ones(dim // heads))
        self.modulation = nn.Linear(dim, (2 if pre_only else 6) * dim)
        if not pre_only:
            self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
            self.out = nn.Linear(dim, dim)
            self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))

    def pre(self, x: Tensor, c: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Queries, keys and values [batch, heads, tokens, head width], and the modulation that is left."""
        shift, scale, *rest = rearrange(self.modulation(F.silu(c)), "b (n d) -> n b 1 d", d=x.shape[-1])
        qkv = self.qkv(self.norm1(x) * (1 + scale) + shift)
        q, k, v = rearrange(qkv, "b n (k h d) -> k b h n d", k=3, h=self.heads)
        return (rms_norm(q, self.q_scale), rms_norm(k, self.k_scale), v), tuple(rest)

    def post(self, x: Tensor, attended: Tensor, rest: tuple[Tensor, ...]) -> Tensor:
        """Residuals of attention and MLP."""
        gate, shift, scale, gate_mlp = rest
        x = x + gate * self.out(attended)
        x = x + gate_mlp * self.mlp(self.norm2(x) * (1 + scale) + shift)
        return x


class JointBlock(nn.Module):
    """One attention over the tokens of both streams."""

    def __init__(self, dim: int, heads: int, last: bool) -> None:
        super().__init__()
        self.streams = nn.ModuleDict({"text": Stream(dim, heads, pre_only=last), "image": Stream(dim, heads)})

    def forward(self, tokens: dict[str, Tensor], c: Tensor) -> dict[str, Tensor]:
        """Tokens [batch, tokens, dim] of each stream under a condition [batch, dim]."""
        before = {name: stream.pre(tokens[name], c) for name, stream in self.streams.items()}  # type: ignore[operator]
        q, k, v = (torch.cat(parts, dim=2) for parts in zip(*(qkv for qkv, _ in before.values()), strict=True))
        sizes = [tokens[name].shape[1] for name in before]
        after = {}
        for name, attended in zip(before, torch.split(attention(q, k, v), sizes, dim=1), strict=True):
            stream = self.streams[name]
            rest = before[name][1]
            after[name] = stream.post(tokens[name], attended, rest) if rest else tokens[name]  # type: ignore[operator]
        return after


class MMDiT(nn.Module):
    """Velocity of a latent image [batch, channels, height, width] of any size that patches divide."""

    def __init__(
        self, channels: int = 16, patch: int = 2, dim: int = 1536, depth: int = 24, heads: int = 24,
        text_dim: int = 4096, pooled_dim: int = 2048,
    ) -> None:  # fmt: skip
        super().__init__()
        self.patch, self.dim = patch, dim
        self.image_in, self.text_in = nn.Linear(channels * patch**2, dim), nn.Linear(text_dim, dim)
        self.time = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.pooled = nn.Sequential(nn.Linear(pooled_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.blocks = nn.ModuleList(JointBlock(dim, heads, last=i == depth - 1) for i in range(depth))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.modulation, self.image_out = nn.Linear(dim, 2 * dim), nn.Linear(dim, channels * patch**2)

    def forward(self, x: Tensor, t: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
        """Latents, times [batch] in 0..1, text [batch, text tokens, text_dim], pooled text [batch, pooled_dim]."""
        h, w = x.shape[2] // self.patch, x.shape[3] // self.patch
        image = self.image_in(rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=self.patch, q=self.patch))
        image = image + positions(self.dim, h, w, x.device).to(x.dtype)
        c = self.time(fourier(t, 256).to(x.dtype)) + self.pooled(pooled)
        tokens = {"text": self.text_in(text), "image": image}
        for block in self.blocks:
            tokens = block(tokens, c)
        shift, scale = rearrange(self.modulation(F.silu(c)), "b (n d) -> n b 1 d", n=2)
        out = self.image_out(self.norm(tokens["image"]) * (1 + scale) + shift)
        velocity: Tensor = rearrange(out, "b (h w) (p q c) -> b c (h p) (w q)", h=h, p=self.patch, q=self.patch)
        return velocity
