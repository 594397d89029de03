"""Inputs as flat lists: binding to forward's parameters, paths of leaves."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from xdit_ir.capture.objects import expand_objects
from xdit_ir.errors import TraceError, XditError
from xdit_ir.ir.wrappers import PLAIN
from xdit_ir.reflection.atoms import VALUES

Example = Mapping[str, Any] | tuple[Any, ...]
"""Arguments of one forward: by name, or by their places."""
_LEAVES = PLAIN | VALUES


def bind_example(model: nn.Module, example: Example) -> dict[str, Any]:
    """The example as a dict of forward's named arguments."""
    return bind_arguments(inspect.signature(model.forward), *split_example(example), TraceError)


def split_example(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and the keyword arguments of an example."""
    return ((), dict(example)) if isinstance(example, Mapping) else (tuple(example), {})


def bind_arguments(
    signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any], error: type[XditError]
) -> dict[str, Any]:
    """Arguments of a call by name, in forward's order; those of `**kwargs` under their own names."""
    try:
        bound = signature.bind(*args, **kwargs).arguments
    except TypeError as problem:
        raise error(f"forward{signature}: {problem}") from problem
    named: dict[str, Any] = {}
    for name, item in bound.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            named.update(item)
        else:
            named[name] = item
    return named


def call_arguments(
    signature: inspect.Signature, named: Mapping[str, Any], by_name: bool
) -> tuple[list[Any], dict[str, Any]]:
    """The inverse of `bind_arguments`; `by_name`: keyword arguments, where a parameter allows both, as code around
    forward (a decorator, a hook) may look for an argument only where its caller puts it."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    positional: set[Any] = {inspect.Parameter.POSITIONAL_ONLY}
    if not by_name or any(kinds.get(name) is inspect.Parameter.VAR_POSITIONAL for name in named):
        positional.add(inspect.Parameter.POSITIONAL_OR_KEYWORD)
    for name, item in named.items():
        kind = kinds.get(name, inspect.Parameter.VAR_KEYWORD)
        if kind is inspect.Parameter.VAR_POSITIONAL:
            args.extend(item)
        elif kind in positional and not kwargs and len(args) == list(kinds).index(name):
            args.append(item)
        else:
            kwargs[name] = item
    return args, kwargs


def flatten_named(named: Mapping[str, Any]) -> tuple[list[tuple[str, Any]], pytree.TreeSpec]:
    """Leaves with printable paths, and the structure."""
    if _LEAVES.issuperset(map(type, named.values())):  # nothing to look into
        return list(named.items()), pytree.tree_flatten(dict(named))[1]
    leaves, spec = pytree.tree_flatten_with_path(expand_objects(dict(named)))
    return [(path_name(path), leaf) for path, leaf in leaves], spec


def path_name(path: Sequence[Any]) -> str:
    """A path of pytree keys as people write it: `a.b[0]`."""
    text = ""
    for key in path:
        if isinstance(key, pytree.SequenceKey):
            text += f"[{key.idx}]"
        else:
            name = str(getattr(key, "key", getattr(key, "name", key)))
            text += f".{name}" if text else name
    return text


def layout_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Its strides, and where it begins."""
    return (*tensor.stride(), tensor.storage_offset())


def sharing(leaves: Iterable[tuple[str, Any]]) -> list[str]:
    """Two plain tensors that lie in the same memory, by their paths; none, if there are not."""
    first: dict[int, str] = {}
    for path, x in leaves:
        if type(x) in PLAIN and not x.is_meta and x.numel():
            other = first.setdefault(x.untyped_storage().data_ptr(), path)
            if other != path:
                return [other, path]
    return []


def same_tensors(given: Iterable[torch.Tensor]) -> tuple[int, ...]:
    """The places at which each tensor was met first; nothing if all are different ones."""
    ids = list(map(id, given))
    return () if len(set(ids)) == len(ids) else tuple(map(ids.index, ids))
