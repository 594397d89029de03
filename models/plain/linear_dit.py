"""Linear-attention DiT: "SANA: Efficient High-Resolution Image Synthesis with Linear Diffusion Transformers"
(Xie et al., arXiv 2410.10629).

ReLU linear attention in channels-first order, cross-attention to masked text, mix-FFN (a depthwise convolution over
the image inside the feed-forward), no positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class LinearAttention(nn.Module):
    """ReLU(q) (ReLU(k)^T v): keys and values are summed before queries see them."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim, self.eps = head_dim, 1e-15
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, tokens, width]."""
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, width).unbind(2)
        q = q.transpose(-1, -2).reshape(batch, width // self.head_dim, self.head_dim, tokens)
        k = k.transpose(-1, -2).reshape(batch, width // self.head_dim, self.head_dim, tokens).transpose(-1, -2)
        v = v.transpose(-1, -2).reshape(batch, width // self.head_dim, self.head_dim, tokens)
        q, k = F.relu(q), F.relu(k)
        v = F.pad(v.float(), (0, 0, 0, 1), mode="constant", value=1)  # a row of ones collects the denominator
        out = torch.matmul(torch.matmul(v, k.float()), q.float())
        out = out[:, :, :-1] / (out[:, :, -1:] + self.eps)
        x = self.proj(out.view(batch, width, tokens).permute(0, 2, 1).to(x.dtype))
        return x


class CrossAttention(nn.Module):
    """Image tokens attend the text, under a mask."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear, self.kv_linear = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, text: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, tokens, width]; text [batch, text tokens, width]; `bias` [batch, 1, 1, text tokens]."""
        batch, tokens, width = x.shape
        q = self.q_linear(x).view(batch, tokens, self.heads, -1).transpose(1, 2)
        k, v = self.kv_linear(text).view(batch, -1, 2, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = self.proj(out.transpose(1, 2).reshape(batch, tokens, width))
        return x


class MixFFN(nn.Module):
    """1 x 1 convolution, 3 x 3 depthwise convolution, gate, 1 x 1 convolution, on the tokens as an image."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.inverted_conv = nn.Conv2d(width, 2 * hidden, 1)
        self.depth_conv = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.point_conv = nn.Conv2d(hidden, width, 1, bias=False)

    def forward(self, x: torch.Tensor, hw: tuple[int, int]) -> torch.Tensor:
        """Tokens [batch, rows * columns, width]."""
        batch, tokens, width = x.shape
        x = x.reshape(batch, *hw, width).permute(0, 3, 1, 2)
        x, gate = self.depth_conv(F.silu(self.inverted_conv(x))).chunk(2, dim=1)
        x = self.point_conv(x * F.silu(gate))
        return x.reshape(batch, width, tokens).permute(0, 2, 1)


class Block(nn.Module):
    """Linear attention, cross-attention, mix-FFN."""

    def __init__(self, width: int, head_dim: int, cross_heads: int, ratio: float = 2.5) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn, self.cross_attn = LinearAttention(width, head_dim), CrossAttention(width, cross_heads)
        self.mlp = MixFFN(width, int(width * ratio))
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(
        self, x: torch.Tensor, text: torch.Tensor, bias: torch.Tensor, t: torch.Tensor, hw: tuple[int, int]
    ) -> torch.Tensor:
        """Tokens [batch, tokens, width]; `t`: six vectors per sample [batch, 6 * width]."""
        modulation = self.scale_shift_table[None] + t.reshape(x.shape[0], 6, -1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=1)
        x = x + gate_a * self.attn(self.norm1(x) * (1 + scale_a) + shift_a)
        x = x + self.cross_attn(x, text, bias)
        x = x + gate_m * self.mlp(self.norm2(x) * (1 + scale_m) + shift_m, hw)
        return x


class LinearDiT(nn.Module):
    """Velocity of a latent image [batch, channels, height, width] from an autoencoder that compresses 32-fold."""

    def __init__(
        self, channels: int = 32, width: int = 2240, depth: int = 20, head_dim: int = 32, cross_heads: int = 20,
        text_dim: int = 2304,
    ) -> None:  # fmt: skip
        super().__init__()
        self.width = width
        self.x_embedder = nn.Conv2d(channels, width, 1)
        self.t_embedder = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = nn.Sequential(nn.Linear(text_dim, width), nn.GELU("tanh"), nn.Linear(width, width))
        self.y_norm = nn.RMSNorm(width)
        self.blocks = nn.ModuleList([Block(width, head_dim, cross_heads) for _ in range(depth)])
        self.final_layer = nn.Linear(width, channels)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, y: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Latents, timesteps [batch], text [batch, text tokens, text_dim] with a mask [batch, text tokens]."""
        batch, _, *hw = x.shape
        x = self.x_embedder(x).flatten(2).transpose(1, 2)
        half = torch.arange(128, device=x.device, dtype=torch.float32)
        angles = timestep[:, None].float() * 10000 ** (-half / 128)
        t = self.t_block(self.t_embedder(torch.cat([angles.cos(), angles.sin()], dim=1).to(x.dtype)))
        text = self.y_norm(self.y_embedder(y))
        bias = ((1 - mask.to(x.dtype)) * -10000.0)[:, None, None, :]
        for block in self.blocks:
            x = block(x, text, bias, t, hw)
        x = self.final_layer(F.layer_norm(x, (self.width,)))
        return x.transpose(1, 2).reshape(batch, -1, *hw)
