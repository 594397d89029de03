"""Traits of blocks that research code has, under `tensor`: exact, each rank with its part of weights and work."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import xdit_ir as xir

WIDTH, SIDE, HEADS = 48, 4, 4
X = torch.randn(2, SIDE * SIDE, WIDTH, generator=torch.Generator().manual_seed(0))
# Blocks have norms and biases, which ranks have whole.
SHARE = 0.52


def attend(x: torch.Tensor, qkv: torch.Tensor) -> torch.Tensor:
    q, k, v = (one.unflatten(-1, (HEADS, -1)).transpose(1, 2) for one in F.linear(x, qkv).chunk(3, -1))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Normalised(nn.Module):
    """Rows of every weight are brought to one length before it is used."""

    def __init__(self) -> None:
        super().__init__()
        shapes = ((3 * WIDTH, WIDTH), (WIDTH, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH))
        self.qkv, self.out, self.up, self.down = (nn.Parameter(torch.randn(shape)) for shape in shapes)
        self.gain = nn.Parameter(torch.ones(()))

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        length = torch.linalg.vector_norm(weight, dim=1, keepdim=True)
        return weight / (1e-4 + length / math.sqrt(weight.shape[1])) * self.gain / math.sqrt(weight.shape[1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + F.linear(attend(x, self.of(self.qkv)), self.of(self.out))
        return x + F.linear(F.silu(F.linear(x, self.of(self.up))), self.of(self.down))


class Layers(nn.Module):
    """A sum of the tokens and what layers make of them, which `over` may parametrise."""

    def __init__(self, *layers: nn.Module, over: Callable[[nn.Module], nn.Module] | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(over(one) if over and isinstance(one, nn.Linear) else one for one in layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for layer in self.layers:
            y = layer(y)
        return x + y


class Plane(nn.Module):
    """Convolutions of groups of channels, and norms of others, over an image."""

    def __init__(self) -> None:
        super().__init__()
        wide, groups = 2 * WIDTH, 4
        self.up, self.down = nn.Conv2d(WIDTH, wide, 1), nn.Conv2d(wide, WIDTH, 1)
        self.middle, self.norm = nn.Conv2d(wide, wide, 3, padding=1, groups=groups), nn.GroupNorm(2 * groups, wide)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plane = x.transpose(1, 2).unflatten(-1, (SIDE, SIDE))
        y = self.down(F.silu(self.norm(self.middle(self.up(plane)))))
        return x + y.flatten(2).transpose(1, 2)


class Experts(nn.Module):
    """All experts for all tokens, in einsums whose weights stand in front."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(WIDTH, 3, bias=False)
        self.up = nn.Parameter(0.2 * torch.randn(3, WIDTH, 2 * WIDTH))
        self.down = nn.Parameter(0.2 * torch.randn(3, 2 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = F.gelu(torch.einsum("edh,btd->bteh", self.up, x))
        return x + torch.einsum("ehd,bteh,bte->btd", self.down, made, self.score(x).softmax(-1))


class Left(nn.Module):
    """Channels first: weights stand left of what they multiply."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(0.2 * torch.randn(2 * WIDTH, WIDTH))
        self.down = nn.Parameter(0.2 * torch.randn(WIDTH, 2 * WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + (self.down @ F.gelu(self.up @ x.transpose(1, 2))).transpose(1, 2)


class Pairs(nn.Module):
    """A bilinear form of two projections."""

    def __init__(self) -> None:
        super().__init__()
        self.few, self.form, self.out = (
            nn.Linear(WIDTH, 8),
            nn.Bilinear(WIDTH, 8, 2 * WIDTH),
            nn.Linear(2 * WIDTH, WIDTH),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.out(F.silu(self.form(x, self.few(x))))


class Reused(nn.Module):
    """A weight is used once as it is and once transposed; a table is the last product too."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(SIDE * SIDE, WIDTH)
        self.weights = nn.ParameterList(0.1 * torch.randn(2 * WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.table(torch.arange(SIDE * SIDE))
        for weight in self.weights:
            x = x + F.gelu(x @ weight.T) @ weight
        return x @ self.table.weight.T


class Blocks(nn.Module):
    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(make() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def mlp(over: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return Layers(nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH), over=over)


KINDS: dict[str, Callable[[], nn.Module]] = {
    "normalised": lambda: Blocks(Normalised),
    "weight_norm": lambda: Blocks(lambda: mlp(nn.utils.parametrizations.weight_norm)),
    "spectral_norm": lambda: Blocks(lambda: mlp(nn.utils.parametrizations.spectral_norm)),
    "groups": lambda: Blocks(Plane),
    "einsums": lambda: Blocks(Experts),
    "left": lambda: Blocks(Left),
    "bilinear": lambda: Blocks(Pairs),
    "reused": Reused,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_rank_has_its_part(kind: str) -> None:
    torch.manual_seed(0)
    model = KINDS[kind]().eval().requires_grad_(False)
    traced, want = xir.trace(model, (X,)), model(X)
    for degrees in ({"tensor": 2}, {"tensor": 2, "ulysses": 2}):
        parallel = traced.parallelize(**degrees)
        for output in parallel.simulate(model, (X,)):
            torch.testing.assert_close(output, want, rtol=1e-4, atol=1e-5)
        report = parallel.report()
        assert report.weight_share <= SHARE and report.share <= SHARE
