"""DiT: "Scalable Diffusion Models with Transformers" (Peebles and Xie, arXiv 2212.09748), class-conditional.

Fused qkv projection, fixed sine-cosine positions, adaLN-Zero modulation, learned variance.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Scale and shift tokens [batch, tokens, width] by one vector per sample [batch, width]."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def sincos_positions(width: int, side: int) -> torch.Tensor:
    """[side * side, width]: half of the columns for the row, half for the column."""
    frequencies = 1.0 / 10000 ** (torch.arange(width // 4) / (width / 4.0))
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequencies for axis in (columns, rows)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of the timestep, then two layers."""

    def __init__(self, width: int, frequencies: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))
        self.frequencies = frequencies

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """Timesteps [batch] to embeddings [batch, width]."""
        half = self.frequencies // 2
        freqs = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
        args = t[:, None].float() * freqs[None]
        embedding: torch.Tensor = self.mlp(torch.cat([torch.cos(args), torch.sin(args)], dim=-1))
        return embedding


class LabelEmbedder(nn.Module):
    """Class labels; the last row of the table stands for "no class" (classifier-free guidance)."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels [batch] to embeddings [batch, width]."""
        embedding: torch.Tensor = self.embedding_table(labels)
        return embedding


class Attention(nn.Module):
    """Self-attention with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, tokens, width]."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        x = self.proj(x.transpose(1, 2).reshape(batch, tokens, width))
        return x


class Block(nn.Module):
    """Attention and MLP, each normalised, modulated and gated by the condition (adaLN-Zero)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, tokens, width] under a condition [batch, width]."""
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        x = x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return x


class FinalLayer(nn.Module):
    """Modulated norm and the projection to patches."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, tokens, width] to patches [batch, tokens, out]."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        patches: torch.Tensor = self.linear(modulate(self.norm_final(x), shift, scale))
        return patches


class DiT(nn.Module):
    """Noise and variance of a latent image [batch, channels, size, size]."""

    pos_embed: torch.Tensor

    def __init__(
        self, size: int = 32, patch: int = 2, channels: int = 4, width: int = 1152, depth: int = 28, heads: int = 16,
        classes: int = 1000,
    ) -> None:  # fmt: skip
        super().__init__()
        self.patch, self.out_channels = patch, 2 * channels
        self.x_embedder = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)
        self.t_embedder, self.y_embedder = TimestepEmbedder(width), LabelEmbedder(classes, width)
        self.register_buffer("pos_embed", sincos_positions(width, size // patch)[None], persistent=False)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.final_layer = FinalLayer(width, patch * patch * self.out_channels)

    def unpatchify(self, x: torch.Tensor) -> torch.Tensor:
        """Patches [batch, tokens, patch * patch * channels] to an image."""
        c, p, side = self.out_channels, self.patch, int(x.shape[1] ** 0.5)
        x = torch.einsum("nhwpqc->nchpwq", x.reshape(x.shape[0], side, side, p, p, c))
        return x.reshape(x.shape[0], c, side * p, side * p)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Latents, timesteps [batch] and labels [batch] to [batch, 2 * channels, size, size]."""
        x = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))
