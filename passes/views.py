"""Algebra of view and permute chains: where does each element come from?"""

from __future__ import annotations

import torch
from torch import fx

from xdit_ir.program import SPEC

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
    found, chain, source = None, [node], node.args[0]
    while isinstance(source, fx.Node):
        if _keeps_order(source, chain):
            found = source
        if source.target not in VIEWS + PERMUTES:
            break
        chain.insert(0, source)
        source = source.args[0]  # type: ignore[assignment]
    return found if len(chain) > 1 or found is not None else None


def _keeps_order(source: fx.Node, chain: list[fx.Node]) -> bool:
    dims: list[Atoms] | None = _contiguous(source.meta[SPEC].shape)
    for node in chain:
        shape = node.meta[SPEC].shape
        if node.target in VIEWS:
            dims = _regroup([atom for dim in dims for atom in dim], shape)
        else:
            dims = [dims[d] for d in _order(node, len(shape))]
        if dims is None:
            return False
    atoms = [(size, stride) for dim in dims for size, stride in dim if size != 1]
    expected = 1
    for size, stride in reversed(atoms):
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


def _order(node: fx.Node, ndim: int) -> list[int]:
    if node.target is aten.permute.default:
        return [d % ndim for d in node.args[1]]  # type: ignore[union-attr, operator]
    order = list(range(ndim))
    a, b = (0, ndim - 1) if node.target is aten.t.default else (int(d) % ndim for d in node.args[1:3])  # type: ignore[arg-type]
    order[a], order[b] = order[b], order[a]
    return order
