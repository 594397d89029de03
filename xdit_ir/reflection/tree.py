"""The modules of a model, in less time than PyTorch's generators take, which go through one for each level."""

from __future__ import annotations

from torch import nn


def modules_of(model: nn.Module) -> list[nn.Module]:
    """As `model.modules()`."""
    return [module for _, module in named_modules_of(model)]


def named_modules_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """As `model.named_modules()`: each once, by its first path, in the same order."""
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found.append((path, module))
        if children := module._modules:
            prefix = f"{path}." if path else ""
            waiting += [(f"{prefix}{name}", one) for name, one in reversed(children.items()) if one is not None]
    return found
