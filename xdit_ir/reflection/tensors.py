"""Trees of tensors: what is inside, what takes its place, and which share memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def map_tensors(tree: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    """Apply a function to the tensors in an operator's arguments (nested lists, tuples and dicts)."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if isinstance(tree, (list, tuple)):
        items = [map_tensors(item, function) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if isinstance(tree, dict):
        return {key: map_tensors(item, function) for key, item in tree.items()}
    return tree


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """The tensors in an operator's arguments or result, in order."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (list, tuple)):
        return []
    return [tensor for item in tree for tensor in tensors_in(item)]


def contents(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a real tensor on the CPU. (No `detach`: it cannot pass through a mode in inference mode.)"""
    return tensor.cpu().clone()


def storage_id(tensor: torch.Tensor) -> int:
    """Equal for tensors that share memory."""
    return int(tensor.untyped_storage()._cdata)


def share_memory(left: Any, right: Any) -> bool:
    """Whether any tensor of one tree shares memory with any of another."""
    taken = {storage_id(tensor) for tensor in tensors_in(right)}
    return any(storage_id(tensor) in taken for tensor in tensors_in(left))
