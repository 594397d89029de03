"""The arguments of a block's call, flattened and comparable."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from xdit_ir.capture.failures import Unshareable
from xdit_ir.capture.inputs import path_name
from xdit_ir.capture.objects import ClassMark, expand_objects
from xdit_ir.capture.recorder import Recorder
from xdit_ir.capture.values import TracedValue
from xdit_ir.reflection.fakes import device_of
from xdit_ir.reflection.fingerprint import describe


@dataclass(frozen=True, eq=False)
class SubmoduleCall:
    """Arguments of a block call: the distinct tensors, and how they and literals make up the arguments.

    Calls with equal `key` differ at most in the contents of their tensors, and in `strides` of dims of one index.
    """

    tensors: list[torch.Tensor]
    values: list[TracedValue]
    names: list[str]
    key: tuple[Any, ...]
    strides: list[tuple[int, ...]]
    leaves: list[Any]
    spec: pytree.TreeSpec


def describe_call(recorder: Recorder, forward: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> SubmoduleCall:
    """Flatten a call's arguments, plain objects too; raises `Unshareable` if tensors or modules hide elsewhere."""
    paths, spec = pytree.tree_flatten_with_path(expand_objects((args, dict(kwargs))))
    tensors: list[torch.Tensor] = []
    names: list[str] = []
    places: dict[int, int] = {}
    kind = recorder.device.type
    key: list[Any] = [str(spec), torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)]
    parameters = _positional(forward)
    for path, leaf in paths:
        if not isinstance(leaf, torch.Tensor):
            key.append(_literal(leaf))
            continue
        if id(leaf) not in places:
            places[id(leaf)] = len(tensors)
            tensors.append(leaf)
            names.append(_unlike(_name(path, parameters), names))
        key.append((places[id(leaf)], tuple(leaf.shape), _steps(leaf), leaf.dtype, str(device_of(leaf))))
    values = [recorder.value(tensor) for tensor in tensors]
    strides = [tensor.stride() for tensor in tensors]
    return SubmoduleCall(tensors, values, names, tuple(key), strides, [leaf for _, leaf in paths], spec)


def _steps(tensor: torch.Tensor) -> tuple[int, ...]:
    """The strides that mean something: those of a dim of one index may tell the format of images apart, no more."""
    if tensor.ndim in (4, 5):
        return tensor.stride()
    return tuple(stride if size != 1 else 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _positional(forward: Any) -> list[str]:
    try:
        return list(inspect.signature(forward).parameters)
    except (TypeError, ValueError):
        return []


def _unlike(name: str, taken: list[str]) -> str:
    """A name that no other argument has, such as all that `*args` takes."""
    numbered = (f"{name}_{number}" for number in itertools.count(1))
    return name if name not in taken else next(one for one in numbered if one not in taken)


def _name(path: Any, parameters: list[str]) -> str:
    """A name for the placeholder of an argument leaf: that of forward's parameter, then the path inside."""
    if path[0].idx == 0:
        index = path[1].idx
        head = parameters[index] if index < len(parameters) else "arg"
        text = head + path_name(path[2:])
    else:
        text = path_name(path[1:])
    return "".join(char if char.isalnum() else "_" for char in text).strip("_")


def _literal(leaf: Any) -> Any:
    if isinstance(leaf, ClassMark):
        return leaf
    inside = vars(leaf) if hasattr(leaf, "__dict__") and not callable(leaf) else None
    hidden = (torch.Tensor, nn.Module)
    if isinstance(leaf, nn.Module) or any(isinstance(item, hidden) for item in pytree.tree_leaves(inside)):
        raise Unshareable(f"an argument of type {type(leaf).__name__}")
    return describe(leaf)
