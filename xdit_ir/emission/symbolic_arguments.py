"""What the integers in a node's arguments stand for, where sizes of its operands are symbols.

Guesses: a position or a length along a symbolic dimension, and the size of a dimension that a symbolic one becomes.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from xdit_ir.emission.sizes import START, Named, Size, Sizes, hint, is_symbolic, place_along, runs_along
from xdit_ir.emission.symbolic_exchanges import EXCHANGES
from xdit_ir.ir import ops
from xdit_ir.ir.partial_attention import partial_attention
from xdit_ir.kernels.write_slice import write_slice

aten = torch.ops.aten
LARGEST_FACTOR = 16
"""A dimension is cut by a model's own sizes (of patches) up to this, beyond it into rows and columns."""


def symbolic_arguments(
    target: Any, args: tuple[Any, ...], kwargs: Named, sizes: Sizes
) -> tuple[tuple[Any, ...], Named]:
    """The arguments of a node with symbols in the place of those integers which stand for symbolic sizes."""
    if target in EXCHANGES:
        return args, {**kwargs, **EXCHANGES[target](args, kwargs, sizes)}
    rule = _RULES.get(target)
    if rule is None or not (target in _FACTORIES or _any_symbolic((args, kwargs))):
        return args, kwargs
    names = _names(target)[: len(args)]
    given = {**dict(zip(names, args, strict=True)), **kwargs}
    given |= rule(given, sizes)
    return tuple(given[name] for name in names), {name: given[name] for name in kwargs}


def _names(target: Any) -> list[str]:
    if isinstance(target, torch._ops.OpOverload):
        return [argument.name for argument in target._schema.arguments]
    return list(inspect.signature(target).parameters)


def _any_symbolic(value: Any) -> bool:
    tensors = (x for x in pytree.tree_leaves(value) if isinstance(x, torch.Tensor))
    return any(is_symbolic(size) for x in tensors for size in x.shape)


def _reshape(given: Named, sizes: Sizes) -> Named:
    """Dimensions are joined and cut in groups: a group without symbols stays as it is."""
    key = "shape" if "shape" in given else "size"
    x, shape = given["self"], list(given[key])
    if 0 in shape or -1 in shape or 0 in map(hint, x.shape):
        return {}
    result: list[Size] = []
    for olds, news in _groups(list(x.shape), shape):
        result += _cut(olds, news, sizes) if any(map(is_symbolic, olds)) else news
    return {key: result}


def _groups(old: Sequence[Size], new: Sequence[int]) -> list[tuple[list[Size], list[int]]]:
    """The fewest dimensions that hold as many elements before and after."""
    groups: list[tuple[list[Size], list[int]]] = []
    at, to = 0, 0
    while at < len(old) or to < len(new):
        olds, news = list(old[at : at + 1]), list(new[to : to + 1])
        at, to = at + 1, to + 1
        while (a := math.prod(map(hint, olds))) != (b := math.prod(news)):
            if a < b or to >= len(new):
                olds.append(old[at])
                at += 1
            else:
                news.append(new[to])
                to += 1
        groups.append((olds, news))
    return groups


def _cut(olds: Sequence[Size], news: Sequence[int], sizes: Sizes) -> list[Size]:
    """The sizes of dimensions that symbolic ones become."""
    if len(news) == 1:
        return [math.prod(olds)]
    kept = {hint(size): size for size in olds if is_symbolic(size)}
    if any(size in kept for size in news):
        return [kept.pop(size, size) for size in news]
    sizes.guessed.append(math.prod(olds))
    again = [place if size in news[:place] else None for place, size in enumerate(news)]  # columns are no rows
    known = [sizes.like(size) for size in news]
    if not any(map(is_symbolic, known)):
        return [size if size <= LARGEST_FACTOR else sizes.some(size, of) for size, of in zip(news, again, strict=True)]
    return [
        one if of is None or not is_symbolic(one) else sizes.some(hint(one), of)
        for one, of in zip(known, again, strict=True)
    ]


def _expand(given: Named, sizes: Sizes) -> Named:
    x, shape = given["self"], list(given["size"])
    own = [None] * (len(shape) - x.dim()) + list(x.shape)
    return {
        "size": [
            size if size < 2 else old if old is not None and hint(old) == size else sizes.like(size)
            for size, old in zip(shape, own, strict=True)
        ]
    }


def _factory(given: Named, sizes: Sizes) -> Named:
    wanted = {key: given[key] for key in ("size", "start", "end") if key in given}
    return {
        key: [_counted(size, sizes) for size in value] if isinstance(value, list | tuple) else _counted(value, sizes)
        for key, value in wanted.items()
    }


def _counted(value: Any, sizes: Sizes) -> Any:
    """The size of what is made: one that is known or, above those of patches, probably tokens of all ranks."""
    if type(value) is not int or value < 2:
        return value
    return sizes.like(value) if value <= LARGEST_FACTOR else sizes.some(value)


def _slice(given: Named, sizes: Sizes) -> Named:
    """Positions and lengths along one dimension."""
    x, dim = given["self"] if "self" in given else given["x"], given.get("dim", 0)
    if not is_symbolic(x.shape[dim]):
        return {}
    found: Named = {}
    for name in ("start", "end", "length", "split_size"):
        if given.get(name) is not None:
            found[name] = place_along(given[name], x.shape[dim], sizes, START if name == "start" else None)
    if "split_sizes" in given:
        found["split_sizes"] = [place_along(size, x.shape[dim], sizes) for size in given["split_sizes"]]
    return found


def _take(given: Named, sizes: Sizes) -> Named:
    key = "parts" if "parts" in given else "runs"
    size = given["x"].shape[given["dim"]]
    if not is_symbolic(size):
        return {}
    value = given[key]
    return {key: runs_along(value, size, sizes) if key == "runs" else tuple(runs_along(v, size, sizes) for v in value)}


def _rows(given: Named, sizes: Sizes) -> Named:
    size = given["k"].shape[-2]
    return {"rows": runs_along(given["rows"], size, sizes)} if is_symbolic(size) else {}


def _columns(given: Named, sizes: Sizes) -> Named:
    """The mask's columns; a dim of all keys is not of the size that one's own part has."""
    columns, mask = given.get("columns"), given.get("mask")
    if columns is None or mask is None or not is_symbolic(mask.shape[-1]):
        return {}
    return {"columns": runs_along(columns, mask.shape[-1], sizes)}


_FACTORIES = frozenset(
    (
        *(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default),
        *(aten.zeros.default, aten.ones.default, aten.full.default, aten.empty.memory_format),
        *(aten.arange.default, aten.arange.start, aten.arange.start_step),
    )
)
_RULES: dict[Any, Callable[[Named, Sizes], Named]] = {
    **dict.fromkeys((aten.reshape.default, aten.view.default, aten._unsafe_view.default), _reshape),
    **dict.fromkeys((aten.slice.Tensor, aten.narrow.default, aten.split.Tensor, aten.slice_scatter.default), _slice),
    **dict.fromkeys((aten.split_with_sizes.default, write_slice), _slice),
    **dict.fromkeys(_FACTORIES, _factory),
    **dict.fromkeys((ops.take, ops.take_each, ops.put), _take),
    aten.expand.default: _expand,
    ops.attention_of_rows: _rows,
    partial_attention: _columns,
}
