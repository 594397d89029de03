"""Operators that one kernel does together."""

from __future__ import annotations

import torch


def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`gelu(linear(x, weight, bias), approximate="tanh")` by the matrix product's epilogue, rounded once.

    `x [..., in]`, `weight [out, in]`, `bias [out]` -> `[..., out]`.
    """
    flat = torch._addmm_activation(bias, x.reshape(-1, x.shape[-1]), weight.t(), use_gelu=True)
    return flat.view(*x.shape[:-1], weight.shape[0])
