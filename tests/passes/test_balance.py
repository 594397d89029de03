"""No rank does what others could share: small models of the ways in which models hide work from a division."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import xdit_ir as xir

WIDTH, HEADS = 32, 4


def attend(q: Tensor, k: Tensor, v: Tensor, **options: bool) -> Tensor:
    q, k, v = (x.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).flatten(2)


class Layer(nn.Module):
    """Self-attention, cross-attention to text, causal attention of text with fewer heads of keys."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.q = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.kv = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        x = x + attend(*self.qkv(x * scale).chunk(3, -1))
        return x + attend(self.q(x), *self.kv(text).chunk(2, -1))


class Embedder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.SiLU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class PerToken(nn.Module):
    """A timestep for every token, flattened before it is embedded, by two blocks that take it whole."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.ModuleList(Embedder() for _ in range(2))
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: Tensor, text: Tensor, timestep: Tensor) -> Tensor:
        flat = timestep.reshape(-1, 1) * torch.arange(WIDTH)
        scale = sum(embed(flat) for embed in self.embed).reshape(*x.shape)
        for layer in self.layers:
            x = layer(x, text, scale)
        return x


class Samples(nn.Module):
    """Texts are embedded together, then joined with the image sample by sample."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH))
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        image, embedded = list(x), self.text(text).unbind()
        joint = [torch.cat([a, b[:n]]) for a, b, n in zip(image, embedded, (8, 5), strict=True)]
        joint = nn.utils.rnn.pad_sequence(joint, batch_first=True)
        for layer in self.layers:
            joint = layer(joint, text, joint)
        return joint[:, : x.shape[1]]


class Causal(nn.Module):
    """Text attends causally to itself, with one head of keys for all, the image to both."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH // HEADS)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        for _ in range(2):
            k, v = self.kv(torch.cat([text, x], 1)).chunk(2, -1)
            n = text.shape[1]
            text = text + attend(self.q(text), k[:, :n], v[:, :n], is_causal=True, enable_gqa=True)
            x = x + attend(self.q(x), k, v, enable_gqa=True)
        return x + text.mean(1, keepdim=True)


def inputs(tokens: int, text: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"x": torch.randn(2, tokens, WIDTH), "text": torch.randn(2, text, WIDTH)}


CASES = [
    pytest.param(PerToken, {**inputs(48, 4), "timestep": torch.rand(2, 48)}, {"ulysses": 4}, id="flattened-timestep"),
    pytest.param(PerToken, {**inputs(24, 48), "timestep": torch.rand(2, 24)}, {"ulysses": 4}, id="much-text"),
    pytest.param(PerToken, {**inputs(24, 48), "timestep": torch.rand(2, 24)}, {"ulysses": 2, "ring": 2}, id="usp"),
    pytest.param(Samples, inputs(16, 8), {"cfg": 2}, id="samples-apart"),
    pytest.param(Samples, inputs(16, 8), {"ulysses": 2}, id="padded-samples"),
    pytest.param(Causal, inputs(48, 16), {"ulysses": 4}, id="causal-with-few-heads"),
    pytest.param(Causal, inputs(48, 16), {"ring": 2}, id="causal-around-a-ring"),
]


@pytest.mark.parametrize(("kind", "example", "degrees"), CASES)
def test_shared_evenly(kind: type[nn.Module], example: dict[str, Tensor], degrees: dict[str, int]) -> None:
    torch.manual_seed(1)
    model = kind()
    traced = xir.trace(model, example)
    result = xir.check(model, example, traced=traced, **degrees)
    assert result.ok, str(result)
    report = traced.parallelize(**degrees).report()
    assert not report.fallbacks, str(report)
    assert sum(report.flops_per_rank) <= 1.06 * report.flops_total, str(report)
