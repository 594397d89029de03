"""PyTorch's attention kernels called by name: captured where they cannot run, divided, and equal to plain attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import xdit_ir as xir
from xdit_ir.simulation.examples import run_single

aten = torch.ops.aten
Attend = Callable[..., torch.Tensor]


class Model(nn.Module):
    """`[2, 12, 32]`; `attend(q, k, v)` of `[batch, heads, tokens, dim]`."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend, self.layers = attend, nn.ModuleList(nn.Linear(32, 96) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            q, k, v = layer(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
            x = x + self.attend(q, k, v).transpose(1, 2).flatten(2)
        return x


def cudnn(q: Any, k: Any, v: Any) -> Any:
    return aten._scaled_dot_product_cudnn_attention(
        query=q, key=k, value=v, attn_bias=None, compute_log_sumexp=False, scale=0.3
    )[0]


def flash(q: Any, k: Any, v: Any) -> Any:
    return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]


def for_cpu(q: Any, k: Any, v: Any) -> Any:
    mask = torch.zeros(12, 12).index_fill(1, torch.tensor([3]), float("-inf"))
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask)[0]


def efficient(q: Any, k: Any, v: Any) -> Any:
    return aten._scaled_dot_product_efficient_attention(q, k, v, None, False)[0]


def plain(causal: bool = False, scale: float | None = None) -> Attend:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)


CASES = [(cudnn, plain(scale=0.3)), (flash, plain(causal=True)), (for_cpu, for_cpu), (efficient, plain())]


@pytest.mark.parametrize(("kernel", "same"), CASES)
def test_kernel_called_by_name_is_attention(kernel: Attend, same: Attend) -> None:
    torch.manual_seed(0)
    model, x = Model(kernel).eval(), torch.randn(2, 12, 32)
    traced = xir.trace(model, {"x": x})
    model.attend = same
    expected = model(x)
    torch.testing.assert_close(run_single(traced.ir, model, {"x": x}), expected)
    parallel = traced.parallelize(ulysses=2)
    assert {entry.kind for entry in parallel.report().collectives} == {"all_to_all", "gather"}
    assert not parallel.report().fallbacks
    for output in parallel.simulate(model, {"x": x}):
        torch.testing.assert_close(output, expected)


def test_logsumexp_of_a_kernel_is_written_out() -> None:
    def attend(q: Any, k: Any, v: Any) -> Any:
        out, lse, *_, longest, _, _, _ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
        return out * lse / longest

    def written(q: Any, k: Any, v: Any) -> Any:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        return out * lse.unsqueeze(-1) / 12

    torch.manual_seed(0)
    model, x = Model(attend).eval(), torch.randn(2, 12, 32)
    traced = xir.trace(model, {"x": x})
    model.attend = written
    torch.testing.assert_close(run_single(traced.ir, model, {"x": x}), model(x))
