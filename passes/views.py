"""Algebra of view and permute chains: where does each element come from?"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from xdit_ir.ir.program import SPEC

aten = torch.ops.aten
# An atom is `(size, stride)`: a factor of a dimension, with its stride in the source's flat row-major order.
Atoms = list[tuple[int, int]]
VIEWS = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
)
PERMUTES = (aten.permute.default, aten.transpose.int, aten.t.default)


def source_of_chain(node: fx.Node) -> fx.Node | None:
    """The farthest value of which `node` is a plain view through a chain of views and permutes, if any."""
    found: fx.Node | None = None
    chain, source = [node], node.args[0]
    while isinstance(source, fx.Node):
        if _keeps_order(source, chain):
            found = source
        if source.target not in VIEWS + PERMUTES:
            break
        chain.insert(0, source)
        source = source.args[0]
    return found


def _keeps_order(source: fx.Node, chain: list[fx.Node]) -> bool:
    """Whether the chain leaves the elements of `source` in row-major order."""
    dims = _contiguous(source.meta[SPEC].shape)
    for node in chain:
        shape = node.meta[SPEC].shape
        if node.target in VIEWS:
            regrouped = _regroup([atom for dim in dims for atom in dim], shape)
            if regrouped is None:
                return False
            dims = regrouped
        else:
            dims = [dims[d] for d in order_of(node, len(shape))]
    expected = 1
    for size, stride in reversed([atom for dim in dims for atom in dim if atom[0] != 1]):
        if stride != expected:
            return False
        expected *= size
    return True


def _contiguous(shape: tuple[int, ...]) -> list[Atoms]:
    dims: list[Atoms] = []
    stride = 1
    for size in reversed(shape):
        dims.insert(0, [(size, stride)])
        stride *= size
    return dims


def _regroup(atoms: Atoms, shape: tuple[int, ...]) -> list[Atoms] | None:
    """Distribute atoms, split where needed, over the dims of a view; None where an atom does not divide."""
    if 0 in shape:
        return None
    rest = [atom for atom in atoms if atom[0] != 1]
    dims: list[Atoms] = []
    for size in reversed(shape):
        dim: Atoms = []
        while size > 1:
            if not rest:
                return None
            length, stride = rest.pop()
            if length <= size and size % length == 0:
                dim.insert(0, (length, stride))
                size //= length
            elif length % size == 0:
                dim.insert(0, (size, stride))
                rest.append((length // size, stride * size))
                size = 1
            else:
                return None
        dims.insert(0, dim or [(1, 1)])
    return dims if not rest else None


def order_of(node: fx.Node, ndim: int) -> list[int]:
    """The permutation that a node of `PERMUTES` applies to its `ndim` dims."""
    if node.target is aten.permute.default:
        dims: Any = node.args[1]
        return [int(d) % ndim for d in dims]
    order = list(range(ndim))
    a, b = (0, ndim - 1) if node.target is aten.t.default else (int(d) % ndim for d in node.args[1:3])  # type: ignore[arg-type]
    order[a], order[b] = order[b], order[a]
    return order
