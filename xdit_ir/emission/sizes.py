"""Sizes of dimensions that are symbols in a run, and what integers stand for beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from xdit_ir.ir.partition import Runs

Size = Any  # an integer or `torch.SymInt`
Named = dict[str, Any]
START = "start"


class Sizes:
    """The symbolic sizes that are known in a run; `new` makes a symbol for a size. Not `trusting`: a number that is
    equal to one of them gets a symbol of its own, and what it meets says whether it is the same.

    `guessed`: what was thought to be symbolic where integers were guessed. `arriving`: the sizes of pieces by those
    that a program names.
    """

    def __init__(self, new: Callable[[int], Size], *, trusting: bool = True) -> None:
        self._new, self._trusting = new, trusting
        self._known: dict[int, dict[Any, Size]] = {}
        self._others: dict[tuple[Any, int], Size] = {}
        self.guessed: list[Size] = []
        self.arriving: dict[Any, tuple[tuple[Size, ...], ...]] = {}

    def see(self, value: Any) -> None:
        """Remember the sizes of tensors."""
        for x in pytree.tree_leaves(value):
            if isinstance(x, torch.Tensor):
                sizes: Sequence[Size] = x.shape
                for size in sizes:
                    if is_symbolic(size):
                        self._known.setdefault(hint(size), {})[size.node.expr] = size

    def like(self, size: int) -> Size:
        """A symbolic size seen before that is `size`; a new symbol, where several are; if none is, `size` itself."""
        seen = self._known.get(size, {}).values()
        found = {one.node.expr: one for one in seen if is_symbolic(one)}
        if len(found) > 1 or (found and not self._trusting):
            return self._new(size)
        return next(iter(found.values()), size)

    def some(self, size: int, of: Any = None) -> Size:
        """The same, or a new symbol; `of` another member of a group: a symbol of its own."""
        if of is None and is_symbolic(known := self.like(size)):
            return known
        if size < 2:
            return size
        if (of, size) not in self._others:
            self._others[of, size] = self._new(size)
        return self._others[of, size]


def is_symbolic(size: Size) -> bool:
    """Whether a size is not known to be one number."""
    return isinstance(size, torch.SymInt) and not size.node.expr.is_number


def hint(size: Size) -> int:
    """What a size is in this run."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def place_along(value: int, whole: Size, sizes: Sizes, of: Any = None) -> Size:
    """A position or a length in a dimension of size `whole`."""
    if not is_symbolic(whole):
        return value
    sizes.guessed.append(whole)
    if not 1 < value <= hint(whole):
        return value
    return whole if value == hint(whole) else sizes.some(value, of)


def runs_along(runs: Runs, whole: Size, sizes: Sizes, of: Any = None) -> Runs:
    """Runs of positions in a dimension of size `whole`; of another member of a group: those of its part."""
    return tuple((place_along(at, whole, sizes, (START, of)), place_along(size, whole, sizes, of)) for at, size in runs)
