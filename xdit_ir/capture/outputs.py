"""Results as flat lists, and back: any nesting of containers and dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from xdit_ir.capture.skeleton import is_plain_object
from xdit_ir.errors import TraceError
from xdit_ir.ir.program import Literal, Signature


@dataclasses.dataclass(frozen=True)
class Record:
    """Heads the list that stands for a dataclass (or object) which pytree does not know."""

    kind: type
    names: tuple[str, ...]


def flatten_output(output: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """Leaves and structure of what a module returned."""
    while True:
        leaves, spec = pytree.tree_flatten(output)
        opened = [_open(leaf) for leaf in leaves]
        if all(new is old for new, old in zip(opened, leaves, strict=True)):
            return leaves, spec
        output = pytree.tree_unflatten(opened, spec)


def _open(leaf: Any) -> Any:
    if isinstance(leaf, (type, Record)) or not (dataclasses.is_dataclass(leaf) or _is_result(leaf)):
        return leaf
    names = tuple(vars(leaf)) if hasattr(leaf, "__dict__") else tuple(item.name for item in dataclasses.fields(leaf))
    return [Record(type(leaf), names), *(getattr(leaf, name) for name in names)]


def _is_result(leaf: Any) -> bool:
    """Whether it is an object of a plain class with tensors among its attributes."""
    if isinstance(leaf, torch.Tensor) or not hasattr(leaf, "__dict__") or not is_plain_object(type(leaf)):
        return False
    return any(isinstance(item, torch.Tensor) or _is_result(item) for item in pytree.tree_leaves(vars(leaf)))


def unflatten_output(leaves: Sequence[Any], spec: pytree.TreeSpec) -> Any:
    """The inverse of `flatten_output`."""
    return _close(pytree.tree_unflatten(list(leaves), spec))


def _is_record(tree: Any) -> bool:
    return type(tree) is list and bool(tree) and isinstance(tree[0], Record)


def _close(tree: Any) -> Any:
    return pytree.tree_map(lambda item: _make(item) if _is_record(item) else item, tree, is_leaf=_is_record)


def _make(tree: list[Any]) -> Any:
    made = object.__new__(tree[0].kind)
    for name, item in zip(tree[0].names, tree[1:], strict=True):
        object.__setattr__(made, name, _close(item))
    return made


def literal(leaf: Any) -> Literal:
    """An output leaf that is no tensor; objects with tensors inside cannot be rebuilt."""
    inside = pytree.tree_leaves(vars(leaf)) if hasattr(leaf, "__dict__") and not isinstance(leaf, type) else []
    if any(isinstance(item, torch.Tensor) for item in inside):
        raise TraceError(
            f"forward returns an object of type {type(leaf).__qualname__}, whose tensors cannot be followed"
        )
    return Literal(leaf)


def build_output(signature: Signature, tensors: Sequence[torch.Tensor]) -> Any:
    """The module's result from the tensors that the graph returned."""
    leaves = [item.value if isinstance(item, Literal) else tensors[item] for item in signature.out_leaves]
    return unflatten_output(leaves, signature.out_spec)
