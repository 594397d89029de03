"""What the integers of exchanges stand for, where sizes of what a rank gives are symbols.

Each member's part of a divided dimension has a size of its own, also where it is equal to others in this run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from xdit_ir.emission.sizes import Named, Size, Sizes, hint, is_symbolic, runs_along
from xdit_ir.ir.collective_ops import PlainAssembly, Takes, cut
from xdit_ir.transport.collectives import AddUp, PackedReceive, PackedSend, Rearrange, Receive, RingAttention, Send
from xdit_ir.transport.mailbox import PeerReceive, PeerSend

Operands = tuple[Any, ...]
Shapes = Sequence[Sequence[Size]]


def _send(given: Operands, fixed: Named, sizes: Sizes) -> Named:
    x, at = given[0], fixed["at"]
    takes = _takes(x, fixed["takes"], sizes, at)
    is_cut = [any(wanted[dim] is not None for wanted in fixed["takes"]) for dim in range(x.dim())]
    shapes = tuple(
        tuple(_arriving(x, dim, size, is_cut[dim], member, at, sizes) for dim, size in enumerate(shape))
        if len(shape) == x.dim()
        else shape
        for member, shape in enumerate(fixed["shapes"])
    )
    sizes.arriving[fixed["shapes"]] = shapes
    return {"takes": takes, "shapes": shapes}


def _arriving(x: torch.Tensor, dim: int, size: int, is_cut: bool, member: int, at: int, sizes: Sizes) -> Size:
    """The size of a dimension of what comes from a member: where `x` is cut, one's own part of it, else that of the
    member."""
    if not is_symbolic(x.shape[dim]) or size < 2:
        return size
    if is_cut:
        return sizes.some(size)
    return x.shape[dim] if member == at else sizes.some(size, member)


def _takes(x: torch.Tensor, takes: Takes, sizes: Sizes, at: int | None = None) -> Takes:
    return tuple(
        tuple(
            runs_along(runs, x.shape[dim], sizes, None if member == at else member)
            if runs is not None and is_symbolic(x.shape[dim])
            else runs
            for dim, runs in enumerate(wanted)
        )
        for member, wanted in enumerate(takes)
    )


def _receive(given: Operands, fixed: Named, sizes: Sizes) -> Named:
    _, own = given
    shapes: list[Sequence[Size]] = list(sizes.arriving.get(fixed["shapes"]) or fixed["shapes"])
    pieces = list(shapes)
    if not fixed["direct"]:
        pieces[fixed["at"]] = tuple(own.shape)
    return {"shapes": tuple(shapes), "assembly": _assembly(fixed["assembly"], pieces, sizes, fixed["at"])}


def _packed_send(given: Operands, fixed: Named, sizes: Sizes) -> Named:
    found = [
        _send((x,), {"takes": takes, "shapes": shapes, "at": fixed["at"]}, sizes)
        for x, takes, shapes in zip(given, fixed["takes"], fixed["shapes"], strict=False)  # and what was before
    ]
    return {key: tuple(one[key] for one in found) for key in ("takes", "shapes")}


def _packed_receive(given: Operands, fixed: Named, sizes: Sizes) -> Named:
    _, *own = given
    found = [
        _receive(
            (None, own[place] if own else None),
            {**fixed, "shapes": shapes, "assembly": assembly},
            sizes,
        )
        for place, (shapes, assembly) in enumerate(zip(fixed["shapes"], fixed["assemblies"], strict=True))
    ]
    return {
        "shapes": tuple(one["shapes"] for one in found),
        "assemblies": tuple(one["assembly"] for one in found),
    }


def _add_up(given: Operands, fixed: Named, sizes: Sizes) -> Named:
    return {"shapes": sizes.arriving.get(fixed["shapes"], fixed["shapes"])}


def _rearrange(given: Operands, fixed: Named, sizes: Sizes) -> Named:
    takes = _takes(given[0], fixed["takes"], sizes)
    pieces = [tuple(piece.shape) for piece in cut(given[0], takes)]
    return {"takes": takes, "assembly": _assembly(fixed["assembly"], pieces, sizes)}


def _assembly(assembly: PlainAssembly, pieces: Shapes, sizes: Sizes, at: int | None = None) -> PlainAssembly:
    shape, dim, sections, places = assembly
    dense = [piece for piece in pieces if len(piece) == len(shape)]
    whole = tuple(_whole(size, [piece[d] for piece in dense], sizes) for d, size in enumerate(shape))
    if dim is not None:
        sections = tuple(
            (member, *runs_along(((start, length),), pieces[member][dim], sizes, None if member == at else member)[0])
            for member, start, length in sections
        )
    places = tuple(
        tuple(
            runs_along(runs, whole[d], sizes, None if member == at else member)
            if runs is not None and is_symbolic(whole[d])
            else runs
            for d, runs in enumerate(each)
        )
        for member, each in enumerate(places)
    )
    return whole, dim, sections, places


def _whole(size: int, parts: Sequence[Size], sizes: Sizes) -> Size:
    """The size of a dimension of a result, of whose pieces these are the sizes."""
    if not any(map(is_symbolic, parts)):
        return size
    if all(hint(part) == size for part in parts):
        return next(filter(is_symbolic, parts))
    return sum(parts) if sum(map(hint, parts)) == size else sizes.some(size)


def _ring(given: Operands, fixed: Named, sizes: Sizes) -> Named:
    own, at = given[1].shape[-2], fixed["at"]
    if not is_symbolic(own):
        return {}
    return {"keys": tuple(own if i == at else sizes.some(size, i) for i, size in enumerate(fixed["keys"]))}


def _put(given: Operands, fixed: Named, sizes: Sizes) -> Named:
    sizes.arriving[fixed["place"]] = (tuple(given[0].shape),)
    return {}


def _landed(given: Operands, fixed: Named, sizes: Sizes) -> Named:
    [sent] = sizes.arriving[fixed["place"]]
    pairs = zip(fixed["shape"], sent, strict=True)
    return {"shape": tuple(sizes.some(size) if is_symbolic(old) else size for size, old in pairs)}


EXCHANGES: dict[Any, Callable[[Operands, Named, Sizes], Named]] = {
    Send.function: _send,
    Receive.function: _receive,
    PackedSend.function: _packed_send,
    PackedReceive.function: _packed_receive,
    AddUp.function: _add_up,
    Rearrange.function: _rearrange,
    RingAttention.function: _ring,
    PeerSend.function: _put,
    PeerReceive.function: _landed,
}
