"""One rank's half of a change of layout: cut what each peer gets, put together what each peer sent."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from xdit_ir.ir.ops import take
from xdit_ir.ir.partition import Runs
from xdit_ir.ir.relayout import RankExchange

ALL = 1000  # parts of what is gathered, of which some begin to travel at one place, others at another


@dataclass(frozen=True)
class Communicate:
    """Target of a node in which a rank talks to the others of `group`, which differ from it in `mesh_dims`."""

    kind: str
    mesh_dims: tuple[str, ...]
    group: tuple[int, ...]

    @property
    def __name__(self) -> str:
        return self.kind

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Only a runtime gives it a meaning."""
        raise AssertionError(f"{self.kind} is executed by a runtime, together with the other ranks")


@dataclass(frozen=True)
class Reshuffle(Communicate):
    """gather, all_to_all, halo_exchange: pieces go from every member to every member."""

    exchange: RankExchange


@dataclass(frozen=True)
class AllGather(Reshuffle):
    """A gather of parts that are equal in size and lie one behind the other, as those of weights do. It goes on beside
    other exchanges, so it has process groups of its own. Where copy engines do it, `first` of `ALL` begin to travel
    where it stands, and more behind exchanges of the block that is running then."""

    first: int = ALL


@dataclass(frozen=True)
class PeerExchange(Reshuffle):
    """The same by the GPUs' copy engines: what is sent lands in the `slots` (byte offsets, of which calls of a block
    take turns) of every member's workspace, and flags on `channel` say so. `behind` it so many of `ALL` parts of what
    is gathered of weights begin to travel."""

    channel: int
    slots: tuple[int, ...]
    behind: int = 0

    @property
    def __name__(self) -> str:
        return f"{self.kind}_by_copies"

    def slot_size(self, itemsize: int) -> int:
        """Bytes of the largest result of any member."""
        return max(math.prod(landing.shape) for landing in self.exchange.landings) * itemsize


@dataclass(frozen=True)
class Together(Communicate):
    """Several changes of layout of one kind as one exchange: of as many values, of one type, into as many results."""

    exchanges: tuple[RankExchange, ...]

    @property
    def __name__(self) -> str:
        return f"{self.kind}_together"


@dataclass(frozen=True)
class Reduce(Communicate):
    """Sum over the group."""


@dataclass(frozen=True)
class ReduceScatter(Communicate):
    """Sum over the group, each member its own part: pieces as in a `Reshuffle`, those that come are summands."""

    exchange: RankExchange


@dataclass(frozen=True)
class Ring(Communicate):
    """Attention with keys and values passed around the group; `keys[i]` of them belong to `group[i]`, and the kernel
    for these is `kernels[i]` (empty: matrix products)."""

    keys: tuple[int, ...]
    kernels: tuple[str, ...] = ()

    @property
    def __name__(self) -> str:
        used = ",".join(dict.fromkeys(filter(None, self.kernels)))
        return f"{self.kind}[{used}]" if used else self.kind


Takes = tuple[tuple[Runs | None, ...], ...]
"""Per member, what is cut for it: positions per dimension (None: all)."""
Section = tuple[int, int, int]
# Boxes of a piece that are copied one by one; where there are more, the places of all elements are listed.
BOXES = 16
PlainAssembly = tuple[tuple[int, ...], int | None, tuple[Section, ...], tuple[tuple[Runs | None, ...], ...]]


def takes_of(exchange: RankExchange) -> Takes:
    """What is cut for each member of the group, in group order."""
    return tuple(piece.take for piece in exchange.sends)


def cut(x: torch.Tensor, takes: Takes) -> list[torch.Tensor]:
    """The pieces of a value that these are."""
    pieces = []
    for wanted in takes:
        part = x
        for dim, runs in enumerate(wanted):
            if runs is not None:
                part = take(part, dim, runs)
        pieces.append(part)
    return pieces


def pack(x: torch.Tensor, exchange: RankExchange) -> list[torch.Tensor]:
    """What goes to each member of the group, in group order."""
    return cut(x, takes_of(exchange))


@dataclass(frozen=True)
class Assembly:
    """How the pieces of all members become one tensor of `shape`; made once per exchange.

    `places[i]` are, per dimension, the positions of member i's piece (None: all); `varied` the dimensions in which
    the pieces of different members have different places.
    """

    shape: tuple[int, ...]
    places: tuple[tuple[Runs | None, ...], ...]
    varied: tuple[int, ...]
    whole: int

    @staticmethod
    def of(exchange: RankExchange) -> Assembly:
        """The assembly of one rank's pieces."""
        whole = [(None, ((0, size),)) for size in exchange.shape]
        varied = [d for d in range(len(exchange.shape)) if any(p[d] not in whole[d] for p in exchange.places)]
        first = exchange.shapes.index(exchange.shape) if not varied else 0
        return Assembly(exchange.shape, exchange.places, tuple(varied), first)

    @property
    def is_contiguous(self) -> bool:
        """Whether the pieces, one after the other in memory, are the result already."""
        if len(self.varied) != 1:
            return False
        dim = self.varied[0]
        runs = [run for places in self.places for run in _runs(places[dim])]
        starts = itertools.accumulate((length for _, length in runs), initial=0)
        ordered = all(start == run[0] for start, run in zip(starts, runs, strict=False))
        return ordered and math.prod(self.shape[:dim]) == 1

    @property
    def plain(self) -> PlainAssembly:
        """What `join` takes behind the pieces: the shape; the dimension along which sections `(member, start, length)`
        of them follow each other, None if they do in several or none; these sections; else the places."""
        if not self.varied:
            return self.shape, None, ((self.whole, 0, 0),), ()
        if len(self.varied) > 1:
            return self.shape, None, (), self.places
        return self.shape, self.varied[0], tuple(self._sections(self.varied[0])), ()

    def _sections(self, dim: int) -> Iterator[Section]:
        """Runs of the pieces in the order of their places along one dimension."""
        found: list[tuple[int, Section]] = []
        for member, places in enumerate(self.places):
            found += [(start, (member, offset, length)) for offset, start, length in _stretches(_runs(places[dim]))]
        return (section for _, section in sorted(found, key=lambda one: one[0]))

    def join(self, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        """The result from the pieces, in group order."""
        return join(pieces, *self.plain)


def join(
    pieces: Sequence[torch.Tensor],
    shape: Sequence[int],
    dim: int | None,
    sections: Sequence[Section],
    places: Sequence[tuple[Runs | None, ...]],
) -> torch.Tensor:
    """Put pieces together, see `Assembly.plain`."""
    if dim is not None:
        ordered = [pieces[member].narrow(dim, start, length) for member, start, length in sections]
        return torch.cat(ordered, dim) if ordered else pieces[0]
    if not places:
        return pieces[sections[0][0]]
    result = pieces[0].new_empty(shape)
    for piece, where in zip(pieces, places, strict=True):
        if piece.numel():
            _put(result, piece, where)
    return result


def _put(result: torch.Tensor, piece: torch.Tensor, places: tuple[Runs | None, ...]) -> None:
    """Copy a piece to its places, box by box as long as these are few: one kernel for each, and no list of places."""
    runs = [(dim, each) for dim, each in enumerate(places) if each is not None]
    if math.prod(len(each) for _, each in runs) > BOXES:
        result[_open_mesh(places, result.shape, piece.device)] = piece
        return
    dims = [dim for dim, _ in runs]
    for box in itertools.product(*(list(_stretches(each)) for _, each in runs)):
        target, source = result, piece
        for dim, (offset, start, length) in zip(dims, box, strict=True):
            target, source = target.narrow(dim, start, length), source.narrow(dim, offset, length)
        target.copy_(source)


def _stretches(runs: Runs) -> Iterator[Section]:
    """Runs of places, and where in a piece that lies there they begin."""
    offset = 0
    for start, length in runs:
        yield offset, start, length
        offset += length


def _open_mesh(places: tuple[Runs | None, ...], shape: Sequence[int], device: torch.device) -> tuple[torch.Tensor, ...]:
    """One index tensor per dimension, that broadcast against each other; made on the device."""
    mesh = []
    for dim, (runs, size) in enumerate(zip(places, shape, strict=True)):
        parts = [torch.arange(start, start + length, device=device) for start, length in runs or ((0, size),)]
        mesh.append(torch.cat(parts).view([-1 if d == dim else 1 for d in range(len(shape))]))
    return tuple(mesh)


def add_up(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of the pieces of all members, in group order, so that it is the same wherever it is done."""
    total = pieces[0]
    for piece in pieces[1:]:
        total = total + piece
    return total


def unpack(pieces: Sequence[torch.Tensor], exchange: RankExchange) -> torch.Tensor:
    """Put the pieces of all members, in group order, together."""
    return Assembly.of(exchange).join(pieces)


def _runs(runs: Runs | None) -> Runs:
    assert runs is not None
    return runs
