"""One rank's half of a change of layout: cut what each peer gets, put together what each peer sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from xdit_ir.layout import Exchange
from xdit_ir.ops import take
from xdit_ir.partition import Indices, Runs


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

    exchange: Exchange


@dataclass(frozen=True)
class Reduce(Communicate):
    """Sum over the group."""


@dataclass(frozen=True)
class Ring(Communicate):
    """Attention with keys and values passed around the group; `keys[i]` of them belong to `group[i]`."""

    keys: tuple[int, ...]


def pack(x: torch.Tensor, exchange: Exchange) -> list[torch.Tensor]:
    """What goes to each member of the group, in group order."""
    pieces = []
    for piece in exchange.sends:
        part = x
        for dim, runs in enumerate(piece.take):
            if runs is not None:
                part = take(part, dim, runs)
        pieces.append(part)
    return pieces


def unpack(pieces: Sequence[torch.Tensor], exchange: Exchange) -> torch.Tensor:
    """Put the pieces of all members, in group order, together."""
    varied = sorted({d for places in exchange.places for d, runs in enumerate(places) if runs is not None})
    varied = [d for d in varied if any(_runs(p[d]) != ((0, exchange.shape[d]),) for p in exchange.places)]
    if not varied:
        return next(piece for piece in pieces if piece.shape == exchange.shape)
    if len(varied) == 1:
        return _concatenate(pieces, [_runs(places[varied[0]]) for places in exchange.places], varied[0])
    result = pieces[0].new_empty(exchange.shape)
    for piece, places in zip(pieces, exchange.places, strict=True):
        if piece.numel():
            index = [_index(runs, size, piece.device) for runs, size in zip(places, exchange.shape, strict=True)]
            result[torch.meshgrid(*index, indexing="ij")] = piece
    return result


def _runs(runs: Runs | None) -> Runs:
    assert runs is not None
    return runs


def _index(runs: Runs | None, size: int, device: torch.device) -> torch.Tensor:
    indices = Indices.range(0, size) if runs is None else Indices(runs)
    return torch.from_numpy(indices.array).to(device)


def _concatenate(pieces: Sequence[torch.Tensor], places: Sequence[Runs], dim: int) -> torch.Tensor:
    """Join runs of the pieces in the order of their places along one dimension."""
    sections = []
    for piece, runs in zip(pieces, places, strict=True):
        offset = 0
        for start, length in runs:
            sections.append((start, piece.narrow(dim, offset, length)))
            offset += length
    ordered = [section for _, section in sorted(sections, key=lambda section: section[0])]
    return torch.cat(ordered, dim) if ordered else pieces[0]
