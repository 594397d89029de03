"""Random weights that keep a model lively: no zero gate, no constant, activations of order one."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def randomize(model: Module, seed: int = 0) -> Module:
    """Refill every parameter in place, deterministically in `seed` (per device type), and return the model.

    Weights of two or more dimensions get N(0, 1 / fan_in), norm weights (and lengths under weight_norm)
    1 + 0.1 N(0, 1), everything else (biases, scale-shift and other tables) 0.1 N(0, 1). A weight that its module
    scales by 1 / sqrt(fan_in) in forward gets N(0, 1). Buffers stay as they are; meta parameters are skipped.
    """
    generators: dict[torch.device, torch.Generator] = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_meta:
                continue
            device = parameter.device
            generator = generators.get(device)
            if generator is None:
                generator = generators[device] = torch.Generator(device).manual_seed(seed)
            noise = torch.randn(parameter.shape, generator=generator, device=device)
            owner = model.get_submodule(name.rpartition(".")[0])
            parameter.copy_(noise if _scales_itself(owner, parameter) else _shape_noise(name, noise))
    return model


def _scales_itself(owner: nn.Module, parameter: torch.Tensor) -> bool:
    """Whether `owner` keeps the factor 1 / sqrt(fan_in) beside its weight (equalised learning rates)."""
    scale = getattr(owner, "scale", None)
    if parameter is not getattr(owner, "weight", None) or parameter.ndim < 2 or not isinstance(scale, float):
        return False
    return bool(abs(scale * float(parameter[0].numel()) ** 0.5 - 1.0) < 1e-6)


def _shape_noise(name: str, noise: torch.Tensor) -> torch.Tensor:
    """Standard normal noise in the shape of parameter `name`, scaled (in place) to its role."""
    own = name.rpartition(".")[2]
    if own in ("weight_g", "original0"):  # the lengths of rows under weight_norm
        return noise.mul_(0.1).add_(1.0)
    if own != "weight":
        return noise.mul_(0.1)
    if noise.ndim < 2:
        return noise.mul_(0.1).add_(1.0)
    fan_in = noise[0].numel()
    return noise.mul_(float(fan_in) ** -0.5)
