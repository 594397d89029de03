"""Spatial-temporal video DiT: factorised attention as in Latte (Ma et al., arXiv 2401.03048) and Open-Sora
(Zheng et al., arXiv 2412.20404).

Pairs of blocks attend within a frame, then at one place over time; cross-attention reads the texts of all samples,
packed without their padding; t2i_final modulation from one shared projection and a table per block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention of [batch, tokens, heads, head width], as flash-attention orders its dimensions."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def rotary(x: torch.Tensor) -> torch.Tensor:
    """Rotate [batch, frames, heads, head width] by the number of the frame."""
    half = x.shape[-1] // 2
    inverse = 10000 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = torch.outer(torch.arange(x.shape[1], device=x.device, dtype=torch.float32), inverse)[:, None, :]
    a, b = x.float().view(*x.shape[:-1], half, 2).unbind(-1)
    turned = torch.stack((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), dim=-1)
    return turned.flatten(-2).type_as(x)


class SelfAttention(nn.Module):
    """Over space, or with rotary positions over time."""

    def __init__(self, width: int, heads: int, temporal: bool) -> None:
        super().__init__()
        self.heads, self.temporal = heads, temporal
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = nn.LayerNorm(width // heads), nn.LayerNorm(width // heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, tokens, width]."""
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.heads, -1).unbind(2)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.temporal:
            q, k = rotary(q), rotary(k)
        x = self.proj(attend(q, k, v).flatten(2))
        return x


class PackedCrossAttention(nn.Module):
    """Each sample's tokens attend its own run of the packed texts."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor, text: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """Tokens [batch, tokens, width]; texts [1, sum(lengths), width]."""
        batch, tokens, width = x.shape
        q = self.q(x).view(batch, tokens, self.heads, -1)
        k, v = self.kv(text).view(1, -1, 2, self.heads, width // self.heads).unbind(2)
        parts, start = [], 0
        for sample, length in enumerate(lengths):
            own = slice(start, start + length)
            parts.append(attend(q[sample : sample + 1], k[:, own], v[:, own]))
            start += length
        x = self.proj(torch.cat(parts, dim=0).reshape(batch, tokens, width))
        return x


class STBlock(nn.Module):
    """Attention over space or time, cross-attention to the text, MLP."""

    def __init__(self, width: int, heads: int, temporal: bool) -> None:
        super().__init__()
        self.temporal = temporal
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn, self.cross_attn = SelfAttention(width, heads, temporal), PackedCrossAttention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(
        self, x: torch.Tensor, text: torch.Tensor, t: torch.Tensor, lengths: list[int], frames: int
    ) -> torch.Tensor:
        """Tokens [batch, frames * places, width]; `t`: six vectors per sample [batch, 6 * width]."""
        batch, tokens, width = x.shape
        modulation = self.scale_shift_table[None] + t.reshape(batch, 6, -1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=1)
        y = (self.norm1(x) * (1 + scale_a) + shift_a).view(batch, frames, tokens // frames, width)
        if self.temporal:
            y = self.attn(y.transpose(1, 2).reshape(-1, frames, width))
            y = y.view(batch, tokens // frames, frames, width).transpose(1, 2)
        else:
            y = self.attn(y.reshape(batch * frames, -1, width))
        x = x + gate_a * y.reshape(batch, tokens, width)
        x = x + self.cross_attn(x, text, lengths)
        x = x + gate_m * self.mlp(self.norm2(x) * (1 + scale_m) + shift_m)
        return x


class STDiT(nn.Module):
    """Noise of a latent video [batch, channels, frames, height, width]."""

    def __init__(
        self, channels: int = 4, patch: tuple[int, int, int] = (1, 2, 2), width: int = 1152, depth: int = 28,
        heads: int = 16, text_dim: int = 4096,
    ) -> None:  # fmt: skip
        super().__init__()
        self.patch, self.channels, self.width = patch, channels, width
        self.x_embedder = nn.Conv3d(channels, width, kernel_size=patch, stride=patch)
        self.t_embedder = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = nn.Sequential(nn.Linear(text_dim, width), nn.GELU("tanh"), nn.Linear(width, width))
        self.spatial_blocks = nn.ModuleList([STBlock(width, heads, temporal=False) for _ in range(depth)])
        self.temporal_blocks = nn.ModuleList([STBlock(width, heads, temporal=True) for _ in range(depth)])
        self.out = nn.Linear(width, channels * patch[0] * patch[1] * patch[2])

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, y: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Latents, timesteps [batch], texts [batch, text tokens, text_dim] with a mask [batch, text tokens]."""
        x = self.x_embedder(x)
        batch, _, frames, rows, columns = x.shape
        x = x.flatten(2).transpose(1, 2)
        half = torch.arange(128, device=x.device, dtype=torch.float32)
        angles = timestep[:, None].float() * 10000 ** (-half / 128)
        t = self.t_block(self.t_embedder(torch.cat([angles.cos(), angles.sin()], dim=1).to(x.dtype)))
        text = self.y_embedder(y)
        text = text.masked_select(mask.unsqueeze(-1) != 0).view(1, -1, self.width)
        lengths = mask.sum(dim=1).tolist()
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            x = spatial(x, text, t, lengths, frames)
            x = temporal(x, text, t, lengths, frames)
        x = self.out(F.layer_norm(x, (self.width,)))
        pt, ph, pw = self.patch
        x = x.view(batch, frames, rows, columns, pt, ph, pw, self.channels).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return x.reshape(batch, self.channels, frames * pt, rows * ph, columns * pw)
