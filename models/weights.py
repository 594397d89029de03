"""Random weights that keep a model lively: no zero gate, no constant, activations of order one."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def randomize(model: Module, seed: int = 0) -> Module:
    """Refill every parameter in place, deterministically in `seed` (per device type), and return the model.

    Weights of two or more dimensions get N(0, 1 / fan_in), norm weights 1 + 0.1 N(0, 1), everything else
    (biases, scale-shift and other tables) 0.1 N(0, 1). Buffers stay as they are; meta parameters are skipped.
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
            parameter.copy_(_shape_noise(name, noise))
    return model


def _shape_noise(name: str, noise: torch.Tensor) -> torch.Tensor:
    """Standard normal noise in the shape of parameter `name`, scaled (in place) to its role."""
    if name.rpartition(".")[2] != "weight":
        return noise.mul_(0.1)
    if noise.ndim < 2:
        return noise.mul_(0.1).add_(1.0)
    fan_in = noise[0].numel()
    return noise.mul_(float(fan_in) ** -0.5)
