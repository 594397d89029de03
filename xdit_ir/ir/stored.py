"""Weights that ranks hold in parts: which bytes of which weights a rank's tensor is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.program import Dims, Stored, TensorSpec

ALIGNMENT = 256  # bytes; what kernels want of where a tensor begins, and a multiple of every element
ReadRun = Callable[[int, int], torch.Tensor]
"""Bytes of a weight, from where on and how many."""
Room = Callable[[Stored], torch.Tensor]
"""As many bytes as are held of something, zeros, where it is to lie."""


@dataclass(frozen=True)
class Run:
    """`length` bytes of a weight from `start` on: of what `of` keeps of them, a rank's tensor is made from `place` on.

    Where the dims behind the first are divided too, they are rows of the type `row`, of which `within` is held.
    """

    name: str
    start: int
    length: int
    place: int
    row: TensorSpec | None = None
    within: Dims = ()

    def of(self, data: torch.Tensor) -> torch.Tensor:
        """What is held of these bytes."""
        if self.row is None:
            return data
        rows = data.view(self.row.dtype).view(-1, *self.row.shape)
        for dim, runs in enumerate(self.within, 1):
            if runs is not None:
                rows = torch.cat([rows.narrow(dim, *run) for run in runs] or [rows.narrow(dim, 0, 0)], dim)
        return bytes_of(rows)


def packed(weights: Mapping[str, TensorSpec], parts: int) -> Stored:
    """These weights one behind the other, such that as many parts are equal and cut no element."""
    members, end = [], 0
    for name in _in_parts({name: spec.nbytes for name, spec in weights.items()}, parts):
        members.append((name, end))
        end = _up(end + weights[name].nbytes, ALIGNMENT)
    return Stored(TensorSpec((_up(end, ALIGNMENT * parts),), torch.uint8), tuple(members))


def _in_parts(sizes: Mapping[str, int], parts: int) -> Iterator[str]:
    """An order in which few of them lie in two of these equal parts: the largest first, each in the part that has
    least; and the fullest parts first, so that what reaches over their ends is small."""
    shared: list[list[str]] = [[] for _ in range(parts)]
    for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
        min(shared, key=lambda part: sum(sizes[one] for one in part)).append(name)
    for part in sorted(shared, key=lambda part: sum(sizes[one] for one in part), reverse=True):
        yield from part


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def is_packed(stored: Stored, state: Mapping[str, TensorSpec]) -> bool:
    """Whether it is bytes, and not a weight as it is."""
    [(name, _), *others] = stored.members
    return bool(others) or stored.spec != state[name]


def source_of(node: fx.Node) -> fx.Node:
    """What was gathered and uploaded to make this."""
    while ops.is_relayout(node.target) or node.target is ops.upload:
        [node] = node.all_input_nodes
    return node


def held_by(stored: Stored, layout: Layout, rank: int) -> Stored:
    """As one rank holds it."""
    return replace(stored, held=tuple(None if dim is None else dim.parts[rank].runs for dim in layout.dims))


def held_spec(stored: Stored) -> TensorSpec:
    """The type of what is held."""
    if stored.held is None:
        return stored.spec
    pairs = zip(stored.spec.shape, stored.held, strict=True)
    shape = (size if runs is None else sum(length for _, length in runs) for size, runs in pairs)
    return TensorSpec(tuple(shape), stored.spec.dtype)


def runs_of(stored: Stored, state: Mapping[str, TensorSpec]) -> Iterator[Run]:
    """What is held, weight by weight."""
    if not stored.spec.nbytes:
        return
    count, *inner = stored.spec.shape or (1,)
    first, *within = stored.held or (None,)
    size, kept = (math.prod(shape) * stored.spec.dtype.itemsize for shape in (inner, held_spec(stored).shape[1:]))
    row = TensorSpec(tuple(inner), stored.spec.dtype) if any(runs is not None for runs in within) else None
    place = 0
    for begin, length in (((0, count),) if first is None else first) if kept else ():
        for name, offset in stored.members:
            start, end = max(begin * size, offset), min((begin + length) * size, offset + state[name].nbytes)
            if start < end:
                at = place + (start - begin * size) * kept // size
                yield Run(name, start - offset, end - start, at, row, tuple(within) if row is not None else ())
        place += length * kept


def room_on(device: torch.device) -> Room:
    """Zeros on a device, also for what is to lie with the host."""
    return lambda stored: torch.zeros(held_spec(stored).nbytes, dtype=torch.uint8, device=device)


class Filling:
    """Parts on the way here: room for them, filled weight by weight, whichever comes first."""

    def __init__(self, missing: Iterable[Stored], specs: Mapping[str, TensorSpec], room: Room) -> None:
        self._made: dict[Stored, torch.Tensor] = {}
        self._wanted: dict[str, list[tuple[torch.Tensor, Run]]] = {}
        for stored in missing:
            with torch.inference_mode(False):  # they outlive the caller's mode
                flat, spec = room(stored), held_spec(stored)
                self._made[stored] = flat.view(spec.dtype).view(spec.shape)
            for run in runs_of(stored, specs):
                self._wanted.setdefault(run.name, []).append((flat, run))

    @property
    def wanted(self) -> list[str]:
        """The weights that have not come yet."""
        return list(self._wanted)

    def fill(self, name: str, read: ReadRun) -> None:
        """Copy what is wanted of a weight."""
        for flat, run in self._wanted.pop(name, ()):
            kept = run.of(read(run.start, run.length))
            flat.narrow(0, run.place, kept.numel()).copy_(kept)

    def done(self) -> dict[Stored, torch.Tensor]:
        """The parts."""
        assert not self._wanted
        return self._made


def bytes_of(x: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes, flat."""
    plain = x.detach().resolve_conj().resolve_neg() if x.is_complex() else x.detach()
    return plain.contiguous().reshape(-1).view(torch.uint8)


def problem(stored: Stored, state: Mapping[str, TensorSpec]) -> str:
    """What is wrong with it; empty if nothing is."""
    end = 0
    for name, offset in stored.members:
        if name not in state:
            return f"{name} is no parameter or buffer of the program"
        if offset % state[name].dtype.itemsize or offset < end:
            return f"{name} begins at byte {offset}, where no element of it can"
        end = offset + state[name].nbytes
    return f"its weights end at byte {end}, behind its end" if end > stored.spec.nbytes else ""


def member_at(
    stored: Stored, state: Mapping[str, TensorSpec], start: int, dtype: torch.dtype, shape: Sequence[int]
) -> str:
    """The weight of this type that begins at a byte; empty if there is none."""
    wanted = TensorSpec(tuple(shape), dtype)
    return next((name for name, at in stored.members if at == start and state[name] == wanted), "")
