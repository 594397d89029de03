"""Tensors of a model by qualified name: parameters, buffers, and those in plain attributes, lists and dicts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from xdit_ir.errors import MismatchError
from xdit_ir.ir.program import CONSTANT, Program
from xdit_ir.ir.wrappers import bare, is_wrapper

Place = tuple[Any, Any]
"""A dict or list, and the key of an entry."""


def way_to(model: nn.Module, name: str) -> list[Place]:
    """The places on the way from a model to a tensor, each in what lies at the one before; the tensor is at the last.

    Raises:
        MismatchError: there is no tensor of this name.
    """
    places: list[Place] = []
    found: Any = model
    try:
        for part in name.split("."):
            places.append(_place(found, part))
            found = _at(places[-1])
    except (LookupError, TypeError, ValueError):
        found = None
    if not isinstance(found, torch.Tensor):
        raise MismatchError(f"the model has no parameter or buffer {name!r} that its program uses")
    return places


def find_tensor(model: nn.Module, name: str) -> torch.Tensor:
    """The tensor of this name, without what its class adds in Python; raises as `way_to`."""
    return bare(_at(way_to(model, name)[-1]))


def named_tensors(model: nn.Module) -> list[tuple[list[str], list[Place]]]:
    """Every parameter and buffer of a model: all names that it has, and its place by each of them."""
    found: dict[int, tuple[list[str], list[Place]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for holder in (module._parameters, module._buffers):
            for leaf, tensor in holder.items():
                if tensor is not None:
                    names, places = found.setdefault(id(tensor), ([], []))
                    names.append(f"{path}.{leaf}" if path else leaf)
                    places.append((holder, leaf))
    return list(found.values())


def _at(place: Place) -> Any:
    holder, key = place
    return holder[key]


def _place(container: Any, part: str) -> Place:
    if is_wrapper(container):
        return vars(container), part
    if isinstance(container, nn.Module):
        holders = (container._parameters, container._buffers, container._modules, container.__dict__)
        return next((holder for holder in holders if holder.get(part) is not None), container.__dict__), part
    return container, int(part) if isinstance(container, (list, tuple)) else part


def constants_on(program: Program, names: Iterable[str], device: torch.device | None) -> dict[str, torch.Tensor]:
    """The constants of these qualified names. Each follows the model: what was on the device of the trace (or stood in
    for meta) is on `device`."""

    def follow(value: torch.Tensor) -> torch.Tensor:
        return value.to(device=device) if program.device.type == "meta" or value.device == program.device else value

    return {name: follow(program.constants[name.removeprefix(f"{CONSTANT}.")]) for name in names}
