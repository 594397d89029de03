"""What forward was given, and the refusal of forwards that change it in ways that callers rely on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from xdit_ir.capture.fingerprint import describe
from xdit_ir.capture.inputs import closed, opened
from xdit_ir.capture.values import Value
from xdit_ir.errors import TraceError

_DEPTH = 4


class Given:
    """The arguments of the traced call: tensors as fakes, objects as copies, in containers of their own."""

    def __init__(self, leaves: Mapping[str, Any], spec: pytree.TreeSpec, copy_of: Callable[[Any], Any]) -> None:
        for path, leaf in leaves.items():
            if not isinstance(leaf, torch.Tensor) and _holds_tensors(leaf, _DEPTH):
                kind = type(leaf).__qualname__
                raise TraceError(f"input {path!r} is of type {kind}, inside which tensors cannot be followed")
        copies = {path: x if isinstance(x, torch.Tensor) else copy_of(x) for path, x in leaves.items()}
        self._leaves = copies
        self._before = {path: describe(x) for path, x in copies.items() if not isinstance(x, torch.Tensor)}
        self.named: dict[str, Any] = closed(pytree.tree_unflatten(list(copies.values()), spec))

    def check_unchanged(self, values: Mapping[str, Value]) -> None:
        """Refuse writes into containers and objects, and into tensors inside containers, as caches do.

        A write to a tensor that is itself an argument is let pass: the caller's tensor is just not written.
        """
        for path, before in self._before.items():
            if describe(self._leaves[path]) != before:
                raise TraceError(f"forward writes to the object that it is given as {path!r}")
        for path, value in values.items():
            if value.storage.version and path not in self.named:
                raise TraceError(f"forward writes to its input {path!r}, as to a cache that outlives the call")
        held = {id(leaf) for leaf in self._leaves.values()}
        for name, item in self.named.items():
            if any(
                isinstance(leaf, torch.Tensor) and id(leaf) not in held for leaf in pytree.tree_leaves(opened(item))
            ):
                raise TraceError(f"forward puts tensors into its input {name!r}, as into a cache")


def _holds_tensors(item: Any, depth: int) -> bool:
    if isinstance(item, (torch.Tensor, nn.Module)):
        return True
    if not depth or isinstance(item, type):
        return False
    inside = list(vars(item).values()) if hasattr(item, "__dict__") else []
    if isinstance(item, Mapping):
        inside += item.values()
    elif isinstance(item, (list, tuple, set)):
        inside += item
    return any(_holds_tensors(entry, depth - 1) for entry in inside)
