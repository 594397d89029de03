"""Results as flat lists, and back: any nesting of containers and dataclasses."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from xdit_ir.errors import TraceError
from xdit_ir.ir.effects import Literal
from xdit_ir.ir.program import Signature
from xdit_ir.ir.wrappers import PLAIN
from xdit_ir.reflection.atoms import ATOMS, is_plain_object
from xdit_ir.reflection.fakes import is_fake
from xdit_ir.reflection.reach import Reach

_BUILT_IN = (dict, list, tuple, set, str, int, float)  # of which a subclass is not made anew without its constructor

_FAKE = frozenset(FakeTensor.__annotations__) | {"fake_device", "item_memo"}


@dataclasses.dataclass(frozen=True)
class Record:
    """Heads the list that stands for a dataclass (or object) which pytree does not know."""

    kind: type
    names: tuple[str, ...]


def flatten_output(output: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """Leaves and structure of what a module returned."""
    while True:
        try:
            leaves, spec = pytree.tree_flatten(output, is_leaf=_is_size)
        except RecursionError:
            raise TraceError("forward returns a container that contains itself") from None
        opened = [_open(leaf) for leaf in leaves]
        if all(new is old for new, old in zip(opened, leaves, strict=True)):
            return leaves, spec
        output = pytree.tree_unflatten(opened, spec)


def attributes_of(tensor: torch.Tensor) -> list[str]:
    """What somebody's code has put on a tensor, beside what it is."""
    if type(tensor) not in PLAIN:
        return []
    return [name for name in vars(tensor) if not name.startswith("_") and name not in _FAKE]


def output_tensors(output: Any) -> list[torch.Tensor]:
    """The tensors of a result, in order, also those in dataclasses and objects."""
    return [leaf for leaf in flatten_output(output)[0] if isinstance(leaf, torch.Tensor)]


def _open(leaf: Any) -> Any:
    if isinstance(leaf, (type, Record, *_BUILT_IN)) or not (dataclasses.is_dataclass(leaf) or _is_result(leaf)):
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


def _is_size(tree: Any) -> bool:
    return isinstance(tree, torch.Size)


def _is_whole(tree: Any) -> bool:
    return _is_record(tree) or _is_size(tree)


def _is_record(tree: Any) -> bool:
    return type(tree) is list and bool(tree) and isinstance(tree[0], Record)


def _close(tree: Any) -> Any:
    return pytree.tree_map(lambda item: _make(item) if _is_record(item) else item, tree, is_leaf=_is_whole)


def _make(tree: list[Any]) -> Any:
    made = object.__new__(tree[0].kind)
    for name, item in zip(tree[0].names, tree[1:], strict=True):
        object.__setattr__(made, name, _close(item))
    return made


def literal(leaf: Any, originals: Mapping[int, Any] | None = None) -> Literal:
    """An output leaf that is no tensor; `originals` are the caller's objects by the ids of copies that were traced.

    Raises:
        TraceError: it has tensors inside, which cannot be followed, or it can be read only once.
    """
    if isinstance(leaf, slice) and not all(isinstance(part, ATOMS) for part in (leaf.start, leaf.stop, leaf.step)):
        raise TraceError("forward returns a slice, whose tensors cannot be followed; return a tuple or a dict")
    if isinstance(leaf, (*ATOMS, type, Record)):
        return Literal(leaf)
    originals = originals or {}
    if id(leaf) in originals:
        return Literal(originals[id(leaf)])
    kind = type(leaf).__qualname__
    if hasattr(type(leaf), "__next__"):
        raise TraceError(f"forward returns a {kind}, which can be read only once; return a list")
    reach = Reach([("", leaf)])
    if any(is_fake(tensor) for _, tensor in reach.tensors):
        raise TraceError(f"forward returns a {kind}, whose tensors cannot be followed; return a tuple or a dict")
    if any(id(module) in originals for _, module in reach.modules):
        raise TraceError(f"forward returns a {kind} that refers to modules of the model; return tensors")
    return Literal(leaf)


def _own(item: Any) -> Any:
    """A literal for one caller, who may change it."""
    return copy.deepcopy(item) if isinstance(item, (dict, list, set, bytearray, np.ndarray)) else item


def build_output(signature: Signature, tensors: Sequence[torch.Tensor]) -> Any:
    """The module's result from the tensors that the graph returned."""
    leaves = [_own(item.value) if isinstance(item, Literal) else tensors[item] for item in signature.out_leaves]
    return unflatten_output(leaves, signature.out_spec)
