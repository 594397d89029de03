"""Samples whose images begin at different places of a joint stream: put in order, so that patches can divide them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.ir.interpret import Interpreter, model_state
from xdit_ir.ir.program import Program
from xdit_ir.models.kinds.parts import Attention
from xdit_ir.passes.align_samples import AlignSamples

KINDS = ("kind-texts-of-lengths", "kind-pieces-of-samples")


class Joined(nn.Module):
    """Text of `lengths` words in front of each sample's tokens, then layers that may or may not know their places."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        lengths, n = mask.sum(1).tolist(), x.shape[1]
        samples = [torch.cat([words[:k], one]) for words, one, k in zip(text, x, lengths, strict=True)]
        joint = nn.utils.rnn.pad_sequence(samples, batch_first=True)
        for layer in self.layers:
            joint = layer(joint)
        return torch.stack([one[k : k + n] for one, k in zip(joint, lengths, strict=True)])


class Causal(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)


class Placed(Attention):
    """A table of places, of which each row takes its own."""

    def __init__(self) -> None:
        super().__init__(8, 2)
        self.places = nn.Parameter(torch.randn(9, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x + self.places)


class Averaged(Attention):
    """Samples that learn of each other."""

    def __init__(self) -> None:
        super().__init__(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x - x.mean(0, keepdim=True))


class Looking(Attention):
    """Rows that are looked up by where they are, between layers that do not care."""

    def __init__(self) -> None:
        super().__init__(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        x = super().forward(x)
        places = x.argmax(-1, keepdim=True).expand_as(x)
        return x + x.gather(1, places) * torch.arange(x.shape[1])[:, None]


def aligned(layer: nn.Module, *, block: bool = True) -> tuple[Program, Program, nn.Module, tuple[torch.Tensor, ...]]:
    model = Joined([layer, copy.deepcopy(layer)] if block else [layer])  # one alone is no block
    example = (torch.randn(2, 6, 8), torch.randn(2, 4, 8), torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]))
    program = xir.trace(model, example).analysed
    return program, AlignSamples().apply(program), model, example


@pytest.mark.parametrize("layer", [Attention(8, 2), Looking()], ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("block", [True, False])
def test_equal_to_the_model(layer: nn.Module, block: bool) -> None:
    before, after, model, example = aligned(layer, block=block)
    assert (after is before) == (block and isinstance(layer, Looking))
    with torch.no_grad():
        [got] = Interpreter(after, model_state(after, model), torch.device("cpu")).run(example)
        torch.testing.assert_close(got, model(*example))


@pytest.mark.parametrize("layer", [Causal(), Placed(), Averaged(), nn.Identity()], ids=lambda one: type(one).__name__)
def test_layers_that_know_their_places_or_samples_are_left_alone(layer: nn.Module) -> None:
    before, after, *_ = aligned(layer)
    assert after is before


@pytest.mark.parametrize("name", KINDS)
def test_divided_over_patches(name: str) -> None:
    model, example = models.load(f"{name}:tiny")
    traced = xir.trace(model, example)
    report = traced.parallelize(pipefusion=2).report()
    assert sum(report.flops_per_rank) <= 1.05 * report.flops_total
    result = xir.check(model, example, traced=traced, pipefusion=2, patches=4)
    assert result.ok, str(result)
