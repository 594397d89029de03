"""Construct a model as `from_pretrained` would, but with the constructor's own weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def build(cls: str, config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The class `cls` (of diffusers, or "package.module:Class") made from `config` on `device` in eval mode.

    Everything floating is `dtype`, except what the class keeps in float32 (as `from_pretrained` does).
    """
    made = named(cls)
    with device, _default_dtype(dtype):
        model: nn.Module = made(**config)
    keep = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    if not keep:
        return nn.Module.to(model, dtype).eval()
    for name, parameter in model.named_parameters():
        wanted = torch.float32 if any(part in name.split(".") for part in keep) else dtype
        parameter.data = parameter.data.to(wanted)
    return model.eval()


def named(name: str) -> Callable[..., Any]:
    """What diffusers calls so, or "package.module:Name"."""
    module, _, own = name.rpartition(":")
    if module:
        made: Callable[..., Any] = getattr(importlib.import_module(module), own)
        return made
    import diffusers

    made = getattr(diffusers, name, None) or getattr(diffusers.models, name)
    return made


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make new parameters in `dtype` right away: a large model never exists in float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
