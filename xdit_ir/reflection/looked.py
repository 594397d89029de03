"""What was looked at of a module and all below it: while nothing of it changes, it need not be described again."""

from __future__ import annotations

from collections.abc import Mapping
from operator import is_
from typing import Any

import torch
from torch import nn

from xdit_ir.reflection.atoms import same_entries
from xdit_ir.reflection.parts import Part

_HELD = ("_parameters", "_buffers", "_modules")


class Looked:
    """What was looked at, and what was there: attributes of modules, containers that were `empty`, `parts` of other
    objects, sizes of tensors. Not `certain`: something is among them whose changes would not be seen."""

    def __init__(self) -> None:
        self.certain = True
        self.empty: list[Any] = []
        self.parts: list[tuple[Part, Mapping[Any, Any]]] = []
        self._modules: list[tuple[nn.Module, type, dict[str, Any]]] = []
        self._dicts: list[tuple[dict[str, Any], list[str], list[Any]]] = []
        self._tensors: list[tuple[torch.Tensor, Any]] = []

    def at_module(self, module: nn.Module) -> None:
        """At its attributes."""
        held = module.__dict__
        self._modules.append((module, type(module), held))
        for one in (held, *(held[name] for name in _HELD)):
            self._dicts.append((one, [*dict.keys(one)], [*dict.values(one)]))

    def at_tensor(self, tensor: torch.Tensor, *, plain: bool) -> None:
        """At all of a parameter or buffer but its contents; others than `plain` ones hold what changes unseen."""
        self.certain &= plain
        self._tensors.append((tensor, _form(tensor)))

    def is_so(self) -> bool:
        """Whether all that was there is there, and nothing else."""
        return (
            self.certain
            and not any(self.empty)
            and all(type(one) is kind and one.__dict__ is held for one, kind, held in self._modules)
            and all([*one] == names and all(map(is_, dict.values(one), values)) for one, names, values in self._dicts)
            and all(_form(tensor) == form for tensor, form in self._tensors)
            and all(same_entries(part.read(), before) for part, before in self.parts)
        )


def _form(tensor: torch.Tensor) -> Any:
    return type(tensor), tensor.shape, tensor.dtype, tensor.device, tensor.stride()
