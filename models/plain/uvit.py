"""U-ViT: "All are Worth Words: A ViT Backbone for Diffusion Models" (Bao et al., arXiv 2209.12152), text to image.

Time and text are tokens beside the patches; long skip connections join shallow and deep blocks; attention is
written out (matrix product, softmax, matrix product); a 3 x 3 convolution ends the model.
"""

from __future__ import annotations

import math

import torch
from torch import nn


def timestep_embedding(timesteps: torch.Tensor, dim: int, max_period: float = 10000.0) -> torch.Tensor:
    """[batch] to [batch, dim]."""
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(0, half, dtype=torch.float32) / half).to(timesteps.device)
    args = timesteps[:, None].float() * freqs[None]
    return torch.cat([torch.cos(args), torch.sin(args)], dim=-1)


class Attention(nn.Module):
    """Self-attention by its formula."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, tokens, dim]."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = (q @ k.transpose(-2, -1)) * self.scale
        attn = attn.softmax(dim=-1)
        x = self.proj((attn @ v).transpose(1, 2).reshape(batch, tokens, dim))
        return x


class Mlp(nn.Module):
    """Two layers with GELU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, tokens, dim]."""
        x = self.fc2(self.act(self.fc1(x)))
        return x


class Block(nn.Module):
    """A pre-norm transformer block; a deep one first joins the tokens of its shallow partner."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, skip: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None

    def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens [batch, tokens, dim]."""
        if self.skip_linear is not None:
            assert skip is not None
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


class UViT(nn.Module):
    """Noise of a latent image [batch, channels, size, size]; `depth` is odd: in blocks, a middle one, out blocks."""

    def __init__(
        self, img_size: int = 32, patch_size: int = 2, in_chans: int = 4, embed_dim: int = 1152, depth: int = 29,
        num_heads: int = 16, clip_dim: int = 768, num_clip_token: int = 77,
    ) -> None:  # fmt: skip
        super().__init__()
        self.embed_dim, self.in_chans, self.patch_size = embed_dim, in_chans, patch_size
        self.patch_embed = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)
        self.context_embed = nn.Linear(clip_dim, embed_dim)
        self.extras = 1 + num_clip_token
        num_patches = (img_size // patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.zeros(1, self.extras + num_patches, embed_dim))
        self.in_blocks = nn.ModuleList([Block(embed_dim, num_heads) for _ in range(depth // 2)])
        self.mid_block = Block(embed_dim, num_heads)
        self.out_blocks = nn.ModuleList([Block(embed_dim, num_heads, skip=True) for _ in range(depth // 2)])
        self.norm = nn.LayerNorm(embed_dim)
        self.decoder_pred = nn.Linear(embed_dim, patch_size**2 * in_chans)
        self.final_layer = nn.Conv2d(in_chans, in_chans, 3, padding=1)

    def unpatchify(self, x: torch.Tensor) -> torch.Tensor:
        """Patches [batch, tokens, patch * patch * channels] to an image."""
        batch, tokens, _ = x.shape
        h = w = int(tokens**0.5)
        p = self.patch_size
        x = x.view(batch, h, w, p, p, self.in_chans).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(batch, self.in_chans, h * p, w * p)

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Latents, timesteps [batch] and text features [batch, text tokens, clip_dim]."""
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        num_tokens = x.shape[1]
        time_token = timestep_embedding(timesteps, self.embed_dim).to(x.dtype).unsqueeze(dim=1)
        x = torch.cat((time_token, self.context_embed(context), x), dim=1)
        x = x + self.pos_embed

        skips = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())

        x = self.decoder_pred(self.norm(x))
        x = x[:, self.extras :, :]
        assert x.size(1) == num_tokens
        x = self.final_layer(self.unpatchify(x))
        return x
