"""Operators beyond the usual: flex attention, transforms of functions, loops as operators, products in eight bits."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

from .parts import blocks, mlp


class FlexBias(nn.Module):
    """`flex_attention` with a score that depends on distance and on a learnt slope, not compiled."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, width), nn.Linear(width, 4)
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(3))
        self.mlps = nn.ModuleList(mlp(width) for _ in range(3))
        self.slopes = nn.Parameter(torch.rand(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, tokens, 4]."""

        def nearer(score, b, h, q, k):  # type: ignore[no-untyped-def]
            return score - self.slopes[h] * (q - k).abs()

        x = self.embed(x)
        for qkv, net in zip(self.qkv, self.mlps, strict=True):
            q, k, v = qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
            x = x + flex_attention(q, k, v, score_mod=nearer).transpose(1, 2).flatten(2)
            x = x + net(x)
        return self.head(x)


class Vectorised(nn.Module):
    """`torch.vmap` over samples, each with a table of its own."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Linear(4, width), blocks(width), nn.Linear(width, 4)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, tokens, 4], one number a sample [batch]."""

        def one(tokens: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
            return self.embed(tokens) * torch.cos(s * torch.arange(len(tokens), device=tokens.device))[:, None]

        x = torch.vmap(one)(x, scale)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Differentiated(nn.Module):
    """The derivative of an energy with respect to the tokens, by `torch.func.grad`."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Linear(4, width), blocks(width), nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, tokens, 4]."""

        def energy(tokens: torch.Tensor) -> torch.Tensor:
            return (torch.sin(tokens) ** 2).sum()

        x = self.embed(x + torch.func.grad(energy)(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Transformed(nn.Module):
    """Networks under `torch.func`: a derivative by `vjp`, one along a direction by `jvp`, and an ensemble by `vmap`."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Linear(4, width), blocks(width), nn.Linear(width, 4)
        self.mlps = nn.ModuleList(mlp(width) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, tokens, 4]."""

        def other(weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(self.mlps[0], weights, (tokens,))

        x = self.embed(x)
        for block, net in zip(self.blocks, self.mlps, strict=True):
            out, pull = torch.func.vjp(net, x)  # type: ignore[misc]
            _, along = torch.func.jvp(net, (x,), (torch.ones_like(x),))  # type: ignore[misc]
            x = block(x + pull(out)[0] + along)
        weights, _ = torch.func.stack_module_state(list(self.mlps))
        return self.head(x + torch.vmap(other, in_dims=(0, None))(weights, x).mean(0))


class CappedScores(nn.Module):
    """`flex_attention` with scores under a soft cap, not compiled."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Linear(4, width), blocks(width), nn.Linear(width, 4)
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, tokens, 4]."""

        def capped(score, b, h, q, k):  # type: ignore[no-untyped-def]
            return 20 * torch.tanh(score / 20)

        x = self.embed(x)
        for block in self.blocks:
            q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
            x = block(x + flex_attention(q, k, v, score_mod=capped).transpose(1, 2).flatten(2))
        return self.head(x)


class ScanOperator(nn.Module):
    """A recurrence by the higher-order operator `scan`."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Linear(4, width), blocks(width), nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, tokens, 4]."""
        from torch._higher_order_ops.scan import scan

        def step(state: torch.Tensor, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            state = 0.9 * state + token
            return state, state.clone()

        x = self.embed(x)
        _, x = scan(step, torch.zeros_like(x[:, 0]), x.movedim(1, 0), dim=0)
        x = x.movedim(0, 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class WhileOperator(nn.Module):
    """Some steps of a refinement by the higher-order operator `while_loop`."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Linear(4, width), blocks(width), nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, tokens, 4]."""
        from torch._higher_order_ops.while_loop import while_loop

        start = torch.tensor(0, device=x.device), self.embed(x)
        _, x = while_loop(lambda i, _: i < 3, lambda i, y: (i + 1, torch.tanh(1.1 * y)), start)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class EightBits(nn.Module):
    """Linear layers as `_scaled_mm` of eight-bit numbers with one scale a row."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Linear(4, width), blocks(width), nn.Linear(width, 4)
        self.weight = nn.Parameter(torch.randn(width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, tokens, 4]."""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x + self.product(x.flatten(0, 1)).view_as(x))
        return self.head(x)

    def product(self, flat: torch.Tensor) -> torch.Tensor:
        """Rows [tokens, width] with the weight."""
        one = torch.ones((), device=flat.device)
        a, b = flat.to(torch.float8_e4m3fn), self.weight.to(torch.float8_e4m3fn)
        return torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.float32)


class EightBitIntegers(EightBits):
    """Linear layers as `_int_mm`, with a scale a row."""

    def product(self, flat: torch.Tensor) -> torch.Tensor:
        """Rows [tokens, width] with the weight."""
        scales = [item.abs().amax(-1, keepdim=True) / 127 for item in (flat, self.weight)]
        a, b = (flat / scales[0]).round().to(torch.int8), (self.weight / scales[1]).round().to(torch.int8)
        return torch._int_mm(a, b.t()) * scales[0] * scales[1].t()


class GroupedProduct(nn.Module):
    """Experts as one grouped product; every expert takes the same number of tokens."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Linear(4, width), blocks(width), nn.Linear(width, 4)
        self.experts = nn.Parameter(torch.randn(4, width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, tokens, 4]; the n-th quarter of all goes to the n-th expert."""
        x = self.embed(x)
        for block in self.blocks:
            flat = x.flatten(0, 1).bfloat16()
            ends = torch.arange(1, 5, device=x.device, dtype=torch.int32) * (len(flat) // 4)
            y = torch._grouped_mm(flat, self.experts.bfloat16(), offs=ends)
            x = block(x + y.to(x).view_as(x))
        return self.head(x)
