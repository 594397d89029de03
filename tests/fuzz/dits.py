"""Random small diffusion transformers: a `Recipe` of independent choices, and the module that it describes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

Draw = Callable[[st.SearchStrategy[Any]], Any]
KINDS = ("self", "self", "cross", "joint", "parallel", "linear", "window", "conv", "causal", "temporal")
BETWEEN = (
    "roll",
    "shift",
    "flip",
    "reorder",
    "pool",
    "upsample",
    "cumsum",
    "frames",
    "softmax",
    "registers",
    "summary",
)
STYLES = ("sdpa", "matmul", "einsum", "fused", "biased")
NORMS = ("layer", "rms", "group", "none")
DTYPE = torch.float64


@dataclass(frozen=True)
class Recipe:
    """Everything that a random model and its inputs are made from.

    `grid` are frames, rows and columns of tokens (frames 1: an image), which come as latents if `patch`, else as a
    sequence.
    """

    batch: int
    grid: tuple[int, int, int]
    patch: int
    text: int
    mask: str
    heads: int
    groups: int
    head_dim: int
    kinds: tuple[str, ...]
    between: tuple[str, ...]
    style: str
    norm: str
    rotary: str
    modulation: str
    mlp: str
    qk_norm: bool
    skips: bool
    spare: bool
    refiner: bool
    output: str
    seed: int

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)


@st.composite
def recipes(draw: Draw) -> Recipe:
    """Recipes of up to four layers and some sixty tokens."""

    def one(*choices: Any) -> Any:
        return draw(st.sampled_from(choices))

    groups = one(1, 2, 3)
    kinds = tuple(draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=4)))
    if one(True, False):
        kinds = (kinds[0],) * len(kinds)
    text = one(0, 1, 4, 7) if not {"cross", "joint", "parallel"} & set(kinds) else one(1, 4, 5, 7)
    return Recipe(
        batch=one(1, 2, 3),
        grid=(one(1, 1, 2, 3), one(2, 4, 5), one(2, 3, 4, 6)),
        patch=one(0, 1, 2),
        text=text,
        mask=one("none", "bool", "additive", "pooled"),
        heads=groups * one(1, 2),
        groups=groups,
        head_dim=one(4, 8),
        kinds=kinds,
        between=tuple(draw(st.lists(st.sampled_from(BETWEEN), max_size=2))),
        style=one(*STYLES),
        norm=one(*NORMS),
        rotary=one("none", "halves", "pairs", "input"),
        modulation=one("none", "block", "shared", "token"),
        mlp=one("gelu", "gated", "conv"),
        qk_norm=one(True, False),
        skips=one(True, False),
        spare=one(True, False),
        refiner=one(True, False),
        output=one("tensor", "tuple", "dict"),
        seed=draw(st.integers(0, 3)),
    )


class Norm(nn.Module):
    """`x [batch, tokens, width]`, normalised over features, or over tokens too."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.kind, self.width = recipe.norm, recipe.width
        self.scale = nn.Parameter(torch.randn(recipe.width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "layer":
            return F.layer_norm(x, (self.width,), self.scale)
        if self.kind == "rms":
            return F.rms_norm(x, (self.width,), self.scale)
        if self.kind == "group":
            return F.group_norm(x.transpose(1, 2), 1, self.scale).transpose(1, 2)
        return x * self.scale


def rotated(x: torch.Tensor, angles: torch.Tensor, kind: str) -> torch.Tensor:
    """`x [batch, heads, tokens, dim]` turned by `angles [tokens, dim / 2]`."""
    cos, sin = angles.cos(), angles.sin()
    if kind == "pairs":
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Attention(nn.Module):
    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        keys = recipe.groups * recipe.head_dim
        self.q, self.k, self.v = (nn.Linear(recipe.width, size) for size in (recipe.width, keys, keys))
        self.out = nn.Linear(recipe.width, recipe.width)
        self.table = nn.Parameter(torch.randn(recipe.heads, 2 * recipe.tokens + 1))

    def heads(self, x: torch.Tensor, angles: torch.Tensor | None, *, queries: bool) -> torch.Tensor:
        if self.recipe.style == "fused":
            both = F.linear(x, torch.cat([self.q.weight, self.k.weight]))
            x = both.split([self.q.out_features, self.k.out_features], -1)[0 if queries else 1]
        else:
            x = (self.q if queries else self.k)(x)
        x = x.unflatten(-1, (-1, self.recipe.head_dim)).transpose(1, 2)
        x = F.rms_norm(x, (self.recipe.head_dim,)) if self.recipe.qk_norm else x
        return x if angles is None else rotated(x, angles, self.recipe.rotary)

    def forward(
        self,
        x: torch.Tensor,
        other: torch.Tensor | None = None,
        angles: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        causal: bool = False,
    ) -> torch.Tensor:
        source = x if other is None else other
        q = self.heads(x, angles, queries=True)
        k = self.heads(source, angles if other is None else None, queries=False)
        v = self.v(source).unflatten(-1, (-1, self.recipe.head_dim)).transpose(1, 2)
        return self.out(self.attended(q, k, v, mask, causal).transpose(1, 2).flatten(2))

    def attended(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool
    ) -> torch.Tensor:
        """Attention as different authors write it."""
        style = self.recipe.style
        if causal or style in ("sdpa", "fused"):
            return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=k.shape[1] != q.shape[1])
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        bias = (
            None
            if mask is None
            else torch.zeros(mask.shape, dtype=DTYPE).masked_fill(~mask, -1e4)
            if mask.dtype == torch.bool
            else mask
        )
        if style == "biased":
            places = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
            relative = self.table[:, places.clamp(-self.recipe.tokens, self.recipe.tokens) + self.recipe.tokens]
            return F.scaled_dot_product_attention(q, k, v, relative if bias is None else relative + bias)
        if style == "einsum":
            scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * 0.3
        else:
            scores = torch.matmul(q * 0.3, k.transpose(-1, -2))
        weights = (scores if bias is None else scores + bias).softmax(-1)
        return torch.einsum("bhqk,bhkd->bhqd", weights, v) if style == "einsum" else torch.matmul(weights, v)

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """Attention without softmax, in time linear in the tokens."""
        repeat = self.recipe.heads // self.recipe.groups
        q = F.relu(self.heads(x, None, queries=True)) + 0.1
        k = F.relu(self.heads(x, None, queries=False).repeat_interleave(repeat, 1))
        v = self.v(x).unflatten(-1, (-1, self.recipe.head_dim)).transpose(1, 2).repeat_interleave(repeat, 1)
        out = q @ (k.transpose(-1, -2) @ v) / (q @ k.sum(-2).unsqueeze(-1) + 1)
        return self.out(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        wide = 2 * recipe.width
        self.up, self.down = nn.Linear(recipe.width, 2 * wide), nn.Linear(wide, recipe.width)
        self.conv = nn.Conv2d(wide, wide, 3, padding=1, groups=wide) if recipe.mlp == "conv" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, gate = self.up(x).chunk(2, -1)
        if self.conv is not None and x.shape[1] == self.recipe.tokens:
            frames, rows, columns = self.recipe.grid
            grid = a.unflatten(1, (frames, rows, columns)).flatten(0, 1).permute(0, 3, 1, 2)
            a = self.conv(grid).permute(0, 2, 3, 1).unflatten(0, (-1, frames)).flatten(1, 3)
        return self.down(a * gate.sigmoid() if self.recipe.mlp == "gated" else F.gelu(a, approximate="tanh") + gate)


class Layer(nn.Module):
    """One layer of any kind; text goes through it too where it is joint."""

    def __init__(self, recipe: Recipe, kind: str) -> None:
        super().__init__()
        self.recipe, self.kind = recipe, kind
        self.norm1, self.norm2, self.norm3 = Norm(recipe), Norm(recipe), Norm(recipe)
        self.attention, self.mlp = Attention(recipe), Mlp(recipe)
        self.cross = Attention(recipe) if kind == "cross" else None
        self.text_mlp = Mlp(recipe) if kind == "joint" else None
        self.conv = nn.Conv2d(recipe.width, recipe.width, 3, padding=1) if kind == "conv" else None
        self.modulation = nn.Linear(recipe.width, 3 * recipe.width) if recipe.modulation != "none" else None

    def forward(
        self,
        x: torch.Tensor,
        text: torch.Tensor | None,
        condition: torch.Tensor,
        angles: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        shift, scale, gate = self.modulated(condition)
        h = self.norm1(x) * (1 + scale) + shift
        if self.kind == "parallel" and text is not None:
            both = torch.cat([text, h], 1)
            both = both + self.attention(both, mask=self.joint_mask(mask, h)) + self.mlp(both)
            text, h = both[:, : text.shape[1]], both[:, text.shape[1] :]
        elif self.kind == "joint" and text is not None:
            both = self.attention(torch.cat([h, self.norm3(text)], 1), mask=self.joint_mask(mask, h, last=True))
            h, added = both.split([h.shape[1], text.shape[1]], 1)
            text = text + added
            text = text + self.text_mlp(text)
        else:
            h = self.mixed(h, angles)
        x = x + h * gate
        if self.cross is not None and text is not None:
            x = x + self.cross(self.norm3(x), text, mask=mask)
        x = x + self.mlp(self.norm2(x))
        extra = (x.mean(1),) if self.recipe.spare else ()
        return (x, *(() if text is None else (text,)), *extra)

    def modulated(self, condition: torch.Tensor) -> tuple[Any, Any, Any]:
        if self.modulation is None:
            return 0.0, 0.0, 1.0
        shift, scale, gate = self.modulation(F.silu(condition)).chunk(3, -1)
        return shift, scale, gate

    def joint_mask(self, mask: torch.Tensor | None, image: torch.Tensor, last: bool = False) -> torch.Tensor | None:
        """The text's mask `[batch, 1, 1, text]`, continued over the image."""
        if mask is None:
            return None
        ones = torch.ones if mask.dtype == torch.bool else torch.zeros
        rest = ones(mask.shape[0], 1, 1, image.shape[1], dtype=mask.dtype, device=mask.device)
        return torch.cat([rest, mask] if last else [mask, rest], -1)

    def mixed(self, h: torch.Tensor, angles: torch.Tensor | None) -> torch.Tensor:
        frames, rows, columns = self.recipe.grid
        if self.kind == "linear":
            return self.attention.linear(h)
        if self.kind == "causal":
            return self.attention(h, angles=angles, causal=True)
        if self.conv is not None:
            grid = h.unflatten(1, (frames, rows, columns)).flatten(0, 1).permute(0, 3, 1, 2)
            return self.conv(grid).permute(0, 2, 3, 1).unflatten(0, (-1, frames)).flatten(1, 3)
        if self.kind == "window" and rows % 2 == 0:
            parts = h.unflatten(1, (frames, rows // 2, 2, columns)).flatten(3, 4).flatten(0, 2)
            return self.attention(parts).unflatten(0, (-1, frames, rows // 2)).flatten(1, 3)
        if self.kind == "temporal":
            parts = h.unflatten(1, (frames, rows * columns)).transpose(1, 2).flatten(0, 1)
            return self.attention(parts).unflatten(0, (-1, rows * columns)).transpose(1, 2).flatten(1, 2)
        return self.attention(h, angles=angles)


class Between(nn.Module):
    """What authors do to tokens between layers: `x [batch, tokens, width]` to the same shape."""

    def __init__(self, recipe: Recipe, what: str) -> None:
        super().__init__()
        self.recipe, self.what = recipe, what
        self.attention = Attention(recipe)
        self.registers = nn.Parameter(torch.randn(1, 3, recipe.width))
        self.register_buffer("order", torch.randperm(recipe.tokens))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        frames, rows, columns = self.recipe.grid
        if self.what == "roll":
            return x + 0.5 * x.roll(1, 1)
        if self.what == "shift":
            return x + 0.5 * F.pad(x[:, :-1], (0, 0, 1, 0))
        if self.what == "flip":
            return x + 0.5 * x.flip(1)
        if self.what == "reorder":
            x = x[:, self.order]
            x = x + self.attention(x)
            return x[:, self.order.argsort()]
        if self.what in ("pool", "upsample") and columns % 2 == 0:
            halves = x.unflatten(1, (-1, columns // 2, 2))
            if self.what == "pool":
                return x + halves.mean(3, keepdim=True).expand_as(halves).flatten(1, 3)
            return x + halves[:, :, :, 0].flatten(1, 2).repeat_interleave(2, 1)
        if self.what == "cumsum":
            return x + x.cumsum(1) / x.shape[1]
        if self.what == "frames":
            grid = x.unflatten(1, (frames, rows * columns))
            return (grid + grid.mean(1, keepdim=True) + grid[:, :1]).flatten(1, 2)
        if self.what == "softmax":
            return x + x * x.softmax(1)
        if self.what == "registers":
            both = torch.cat([self.registers.expand(x.shape[0], -1, -1), x], 1)
            return (both + self.attention(both))[:, 3:]
        both = torch.cat([x, x.mean(1, keepdim=True)], 1)
        both = both + self.attention(both)
        return both[:, :-1] + both[:, -1:]


class FuzzDiT(nn.Module):
    def __init__(self, recipe: Recipe, channels: int = 3) -> None:
        super().__init__()
        self.recipe = recipe
        size = recipe.patch or 1
        self.patches = nn.Conv2d(channels, recipe.width, size, size) if recipe.patch else nn.Linear(3, recipe.width)
        self.text, self.time = nn.Linear(5, recipe.width), nn.Linear(4, recipe.width)
        self.refiner = Layer(recipe, "self") if recipe.refiner else None
        self.layers = nn.ModuleList(Layer(recipe, kind) for kind in recipe.kinds)
        self.joins = nn.ModuleList(nn.Linear(2 * recipe.width, recipe.width) for _ in recipe.kinds)
        self.between = nn.ModuleList(Between(recipe, what) for what in recipe.between)
        self.norm, self.last = Norm(recipe), nn.Linear(recipe.width, channels * size * size)

    def forward(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        text: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        angles: torch.Tensor | None = None,
    ) -> Any:
        x = self.embedded(latents)
        bias = None
        if text is not None:
            text = self.text(text)
            text, bias = self.masked(text, mask)
        waves = torch.arange(4, dtype=DTYPE, device=x.device)
        condition = self.time(torch.cos(timestep[..., None] * 0.01 ** (waves / 4)))
        condition = condition if condition.dim() == 3 else condition[:, None]
        if text is not None and self.recipe.mask == "pooled":
            condition = condition + text.mean(1, keepdim=True)
        turned = self.angles(angles, x)
        if self.refiner is not None:
            x = self.refiner(x, None, condition, turned, None)[0]
        skips = []
        for place, (layer, join) in enumerate(zip(self.layers, self.joins, strict=True)):
            if self.recipe.skips and place >= (len(self.layers) + 1) // 2:
                x = join(torch.cat([x, skips.pop()], -1))
            results = layer(x, text, condition, turned, bias)
            x = results[0]
            text = results[1] if text is not None else None
            skips.append(x)
            if place < len(self.between):
                x = self.between[place](x)
        return self.result(self.last(self.norm(x)))

    def embedded(self, latents: torch.Tensor) -> torch.Tensor:
        if not self.recipe.patch:
            return self.patches(latents)
        frames = self.recipe.grid[0]
        x = self.patches(latents.transpose(1, 2).flatten(0, 1))
        return x.flatten(2).transpose(1, 2).unflatten(0, (-1, frames)).flatten(1, 2)

    def masked(self, text: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        if mask is None:
            return text, None
        if self.recipe.mask == "bool":
            return text, mask[:, None, None]
        if self.recipe.mask == "additive":
            return text, ((1 - mask.to(DTYPE)) * -10000.0)[:, None, None]
        return text * mask[..., None], None

    def angles(self, given: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
        if self.recipe.rotary == "none" or given is not None:
            return given
        places = torch.arange(x.shape[1], device=x.device, dtype=DTYPE)
        return places[:, None] * 0.1 ** torch.arange(self.recipe.head_dim // 2, device=x.device, dtype=DTYPE)

    def result(self, x: torch.Tensor) -> Any:
        size = self.recipe.patch
        if size:
            frames, rows, columns = self.recipe.grid
            x = x.unflatten(1, (frames, rows, columns)).unflatten(-1, (size, size, -1))
            x = x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5).flatten(3, 4)
        return {"tensor": x, "tuple": (x,), "dict": {"sample": x}}[self.recipe.output]


def build(recipe: Recipe) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The model with random weights, and the arguments of one forward."""
    torch.manual_seed(recipe.seed)
    model = FuzzDiT(recipe).to(DTYPE).eval()
    frames, rows, columns = recipe.grid
    shape = (recipe.batch, recipe.tokens, 3)
    if recipe.patch:
        shape = (recipe.batch, 3, frames, rows * recipe.patch, columns * recipe.patch)
    times = (recipe.batch, recipe.tokens) if recipe.modulation == "token" else (recipe.batch,)
    example = {"latents": torch.randn(shape, dtype=DTYPE), "timestep": 1000 * torch.rand(times, dtype=DTYPE)}
    if recipe.text:
        example["text"] = torch.randn(recipe.batch, recipe.text, 5, dtype=DTYPE)
        if recipe.mask != "none":
            lengths = torch.randint(1, recipe.text + 1, (recipe.batch, 1))
            example["mask"] = torch.arange(recipe.text)[None] < lengths
    if recipe.rotary == "input":
        example["angles"] = torch.randn(recipe.tokens, recipe.head_dim // 2, dtype=DTYPE)
    return model, example
