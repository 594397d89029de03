"""Ways to quantise the linear layers of a model, by name; torchao and gguf need not be installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn


def int8_weights(model: nn.Module) -> None:
    ao = pytest.importorskip("torchao.quantization")
    ao.quantize_(model, ao.Int8WeightOnlyConfig())


def int8_dynamic(model: nn.Module) -> None:
    ao = pytest.importorskip("torchao.quantization")
    ao.quantize_(model, ao.Int8DynamicActivationInt8WeightConfig())


def float8_weights(model: nn.Module) -> None:
    ao = pytest.importorskip("torchao.quantization")
    ao.quantize_(model, ao.Float8WeightOnlyConfig())


def float8_by_rows(model: nn.Module) -> None:
    try:
        one = torch.ones(16, 16).to(torch.float8_e4m3fn)
        torch._scaled_mm(one, one.t(), torch.ones(16, 1), torch.ones(1, 16))
    except RuntimeError:
        pytest.skip("PyTorch before 2.13 has no product with scales by rows on CPUs")
    _float8_dynamic(model, "PerRow")


def float8_by_tensors(model: nn.Module) -> None:
    _float8_dynamic(model, "PerTensor")


def _float8_dynamic(model: nn.Module, granularity: str) -> None:
    """As `Float8DynamicActivationFloat8WeightConfig`, which asks for a GPU."""
    ao = pytest.importorskip("torchao.quantization")
    float8 = pytest.importorskip("torchao.quantization.quantize_.workflows.float8.float8_tensor")
    made, config = getattr(ao, granularity)(), float8.Float8MMConfig(use_fast_accum=True)
    activations = float8.QuantizeTensorToFloat8Kwargs(torch.float8_e4m3fn, made, mm_config=config)
    for layer in [layer for layer in model.modules() if isinstance(layer, nn.Linear)]:
        weight = float8.Float8Tensor.from_hp(
            layer.weight.detach(), granularity=made, mm_config=config, act_quant_kwargs=activations
        )
        layer.weight = nn.Parameter(weight, requires_grad=False)


def gguf(model: nn.Module) -> None:
    """Q8_0, of 32 numbers with a scale each, in diffusers' layers."""
    library = pytest.importorskip("gguf")
    layers = pytest.importorskip("diffusers.quantizers.gguf.utils")
    kind = library.GGMLQuantizationType.Q8_0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child.in_features % 32 == 0:
                data = library.quants.quantize(child.weight.detach().float().numpy(), kind)
                made = layers.GGUFLinear(child.in_features, child.out_features, child.bias is not None, torch.float32)
                made.weight, made.bias = layers.GGUFParameter(torch.from_numpy(data), quant_type=kind), child.bias
                setattr(parent, name, made)


def layerwise_casting(model: nn.Module) -> None:
    hooks: Any = pytest.importorskip("diffusers.hooks")
    own = getattr(model, "_skip_layerwise_casting_patterns", None)  # layers whose weights the model's code looks at
    hooks.apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32, own or "auto")


WAYS: dict[str, Callable[[nn.Module], None]] = {
    one.__name__: one
    for one in (int8_weights, int8_dynamic, float8_weights, float8_by_rows, float8_by_tensors, gguf, layerwise_casting)
}
DYNAMIC = {"int8_dynamic", "float8_by_rows", "float8_by_tensors"}  # a number on an edge is rounded up or down
