"""Inputs and outputs as flat lists: binding, guards and the rebuilding of results."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from xdit_ir.errors import MismatchError, TraceError
from xdit_ir.program import Literal, Signature


def bind_example(model: nn.Module, example: Mapping[str, Any] | tuple[Any, ...]) -> dict[str, Any]:
    """The example as a dict of forward's named arguments."""
    args, kwargs = ((), dict(example)) if isinstance(example, Mapping) else (tuple(example), {})
    return bind_arguments(model, args, kwargs, TraceError)


def bind_arguments(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], error: type[Exception] = MismatchError
) -> dict[str, Any]:
    """Arguments of a call as a dict of forward's named arguments, in forward's order."""
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as problem:
        raise error(f"{type(model).__name__}.forward: {problem}") from problem
    return dict(bound.arguments)


def call_arguments(model: nn.Module, named: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The inverse of `bind_arguments`: positional and keyword arguments for a call."""
    bound = inspect.signature(model.forward).bind_partial()
    bound.arguments.update(named)
    return list(bound.args), dict(bound.kwargs)


def path_name(path: Sequence[Any]) -> str:
    """`(MappingKey('a'), MappingKey('b'), SequenceKey(0))` as `a.b[0]`."""
    text = ""
    for key in path:
        if isinstance(key, pytree.MappingKey):
            text += f".{key.key}" if text else str(key.key)
        elif isinstance(key, pytree.SequenceKey):
            text += f"[{key.idx}]"
        else:
            text += f".{getattr(key, 'name', key)}"
    return text


@dataclasses.dataclass(frozen=True)
class Record:
    """Stands in a flattened output for a dataclass that pytree does not know."""

    kind: type
    names: tuple[str, ...]


def flatten_output(output: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """Leaves and structure of what forward returned; dataclasses unknown to pytree become marked lists."""
    return pytree.tree_flatten(_open(output))


def _open(tree: Any) -> Any:
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type) and _is_leaf(tree):
        names = tuple(item.name for item in dataclasses.fields(tree))
        return [Record(type(tree), names), *(_open(getattr(tree, name)) for name in names)]
    if type(tree) in (list, tuple):
        return type(tree)(_open(item) for item in tree)
    if type(tree) is dict:
        return {key: _open(item) for key, item in tree.items()}
    return tree


def _is_leaf(tree: Any) -> bool:
    leaves = pytree.tree_leaves(tree)
    return len(leaves) == 1 and leaves[0] is tree


def _close(tree: Any) -> Any:
    if type(tree) is list and tree and isinstance(tree[0], Record):
        made = object.__new__(tree[0].kind)
        for name, item in zip(tree[0].names, tree[1:], strict=True):
            object.__setattr__(made, name, _close(item))
        return made
    if type(tree) in (list, tuple):
        return type(tree)(_close(item) for item in tree)
    if type(tree) is dict:
        return {key: _close(item) for key, item in tree.items()}
    return tree


def build_output(signature: Signature, tensors: Sequence[torch.Tensor]) -> Any:
    """The module's result from the tensors that the graph returned."""
    leaves = [item.value if isinstance(item, Literal) else tensors[item] for item in signature.out_leaves]
    return _close(pytree.tree_unflatten(leaves, signature.out_spec))
