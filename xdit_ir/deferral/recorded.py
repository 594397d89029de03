"""What was done to results that are not finished yet, as a graph of values, from which any part can be computed."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree

from xdit_ir.deferral.descent import Descent, Lineage
from xdit_ir.deferral.samples import Samples, Step, carried
from xdit_ir.deferral.separable import MovedRows, Needs, Range, operand_ranges, pieces, resized, tensors_in
from xdit_ir.errors import MismatchError

aten = torch.ops.aten
_LITERALS = (float, int, bool, str, torch.dtype)
Numbers = tuple[float, ...]
SMALL = 4096  # bytes of a concrete operand that is copied when it is recorded, since schedulers reuse such


class Source(Protocol):
    """Where the parts of a pending result come from."""

    def part(self, dim: int, start: int, stop: int) -> torch.Tensor:
        """A range of one dimension; may wait."""
        ...

    def whole(self) -> torch.Tensor:
        """All of it; may wait."""
        ...


@dataclass(eq=False)
class RecordedValue:
    """A node of what was recorded: `func(*args, **kwargs)[index]`, a pending result, or a finished tensor."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    source: Source | None = None
    func: Any = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    index: int | None = None
    done: torch.Tensor | None = None
    parts: dict[Range, torch.Tensor] = field(default_factory=dict)
    lineage: Lineage = field(default_factory=dict)

    def pull(self, wanted: Range) -> torch.Tensor | None:
        """This range of it, or None where it does not follow from the same range of what it was made of."""
        if self.done is not None:
            return self.done.narrow(wanted.dim, wanted.start, wanted.size)
        if not wanted.size:
            sizes = [0 if dim == wanted.dim else size for dim, size in enumerate(self.shape)]
            return torch.empty(sizes, dtype=self.dtype, device=self.device)
        if wanted not in self.parts:
            part = self._computed(wanted)
            if part is None:
                return None
            self.parts[wanted] = part
            self._settle(wanted.dim)
        if self.done is not None:
            return self.done.narrow(wanted.dim, wanted.start, wanted.size)
        return self.parts[wanted]

    def is_separable(self, wanted: Range) -> bool:
        """Whether `pull` would succeed, without computing anything."""
        if self.done is not None or wanted in self.parts or self.source is not None or not wanted.size:
            return True
        needs = self._needs(wanted)
        return needs is not None and all(
            value.is_separable(part)
            for value, part in zip(self._operands(), needs, strict=True)
            if isinstance(value, RecordedValue) and part is not None
        )

    def whole(self) -> torch.Tensor:
        """All of it."""
        if self.done is None:
            if self.source is not None:
                self._finish(self.source.whole())
            else:
                args, kwargs = pytree.tree_map(_whole, (self.args, self.kwargs))
                self._finish(self._pick(_replayed(self.func)(*args, **kwargs)))
        assert self.done is not None
        return self.done

    def combined(self, name: str, known: Set[int]) -> Iterator[tuple[str, torch.Tensor | Numbers]]:
        """The tensors with which pending results were combined to make this, such as noise, each with the way to it,
        and by which operators with which numbers; but for what went into values that are `known`, by id."""
        seen, todo = set(known), [(name, self)]
        while todo:
            way, value = todo.pop()
            if id(value) in seen:
                continue
            seen.add(id(value))
            numbers: list[float] = []
            for place, operand in enumerate(value._operands()):
                if isinstance(operand, RecordedValue):
                    todo.append((f"{way}.{place}", operand))
                elif operand.tensor.numel() > 1 and operand.tensor.device == self.device:
                    yield f"{way}.{place}", operand.tensor
                elif operand.tensor.numel() == 1 and operand.tensor.device.type == "cpu":
                    numbers.append(float(operand.tensor.real))
            if value.func is not None:
                literals = [x for x in pytree.tree_leaves((value.args, value.kwargs)) if isinstance(x, _LITERALS)]
                numbers += [x for x in literals if isinstance(x, float)]
                text = f"{value.func}{[x for x in literals if not isinstance(x, float)]}"
                yield f"{way} (its operator)", (float(zlib.crc32(text.encode())),)
                if numbers:
                    yield f"{way} (its numbers)", tuple(numbers)

    def _operands(self) -> list[RecordedValue | Kept]:
        return tensors_in((self.args, self.kwargs), (RecordedValue, Kept))

    def _pieces(self, dim: int) -> list[MovedRows] | None:
        shapes = [operand.shape for operand in self._operands()]
        return pieces(self.func, self.args, self.index, shapes, self.shape, dim)

    def _needs(self, wanted: Range) -> Needs | None:
        if (moved := self._pieces(wanted.dim)) is not None:
            return [piece.of(wanted) for piece in moved]
        shapes = [operand.shape for operand in self._operands()]
        return operand_ranges(self.func, self.args, shapes, self.shape, wanted)

    def _computed(self, wanted: Range) -> torch.Tensor | None:
        if self.source is not None:
            return self.source.part(wanted.dim, wanted.start, wanted.stop)
        needs = self._needs(wanted)
        if needs is None:
            return None
        pulled = []
        for operand, part in zip(self._operands(), needs, strict=True):
            piece = _whole(operand) if part is None else operand.pull(part)
            if piece is None:
                return None
            pulled.append(piece)
        if self._pieces(wanted.dim) is not None:
            return torch.cat(pulled, wanted.dim) if len(pulled) > 1 else pulled[0]
        supply = iter(pulled)
        args, kwargs = pytree.tree_map_only((RecordedValue, Kept), lambda _: next(supply), (self.args, self.kwargs))
        return self._pick(_replayed(self.func)(*resized(self.func, args, self.shape, wanted), **kwargs))

    def _pick(self, result: Any) -> torch.Tensor:
        picked: torch.Tensor = result if self.index is None else result[self.index]
        return picked

    def _settle(self, dim: int) -> None:
        """Once the parts cover everything, forget how they were made: a loop must not keep its whole history."""
        parts = sorted((part for part in self.parts if part.dim == dim), key=lambda part: part.start)
        ends = [0, *(part.stop for part in parts)]
        if [part.start for part in parts] == ends[:-1] and ends[-1] == self.shape[dim]:
            self._finish(torch.cat([self.parts[part] for part in parts], dim))

    def descend(self) -> RecordedValue:
        """Note of which pending results this was made."""
        operands = [operand for operand in self._operands() if isinstance(operand, RecordedValue) and operand.lineage]
        makers = dict.fromkeys(maker for operand in operands for maker in operand.lineage)
        if makers:
            needs = [self._needs(Range(dim, 0, size)) for dim, size in enumerate(self.shape)]
            self.lineage = {maker: self._descent(maker, needs) for maker in makers}
        return self

    def _descent(self, maker: Any, needs: Sequence[Needs | None]) -> Descent:
        descents = [v.lineage.get(maker) if isinstance(v, RecordedValue) else None for v in self._operands()]
        newest = max((one for one in descents if one is not None), key=lambda one: one.number).result
        dims: list[tuple[int, int] | None] = []
        for dim, needed in enumerate(needs):
            shifts = [piece.start - piece.place for piece in self._pieces(dim) or ()] or [0] * len(descents)
            followed = {
                None if part is None or (was := source.dims[part.dim]) is None else (was[0], was[1] + shift)
                for source, part, shift in zip(descents, needed or (), shifts, strict=False)
                if source is not None and source.number == newest.number
            }
            dims.append(followed.pop() if len(followed) == 1 else None)
        return Descent(newest, tuple(dims), self._samples(descents, newest.number, needs))

    def _samples(
        self, descents: Sequence[Descent | None], newest: int, needs: Sequence[Needs | None]
    ) -> Samples | None:
        made = [one for one in descents if one is not None and one.number == newest]
        if any(one.samples is None for one in made):
            return None
        found = [one.samples if one is not None and one.number == newest else None for one in descents]
        shapes = [operand.shape for operand in self._operands()]
        return carried(Step(self.func, self.args, self.index, shapes, self.shape, needs), found)

    def _finish(self, value: torch.Tensor) -> None:
        self.done, self.source, self.func = value, None, None
        self.args, self.kwargs, self.parts = (), {}, {}


@dataclass(eq=False)
class Kept:
    """A concrete operand as it was when it was recorded."""

    tensor: torch.Tensor
    version: int

    @property
    def shape(self) -> torch.Size:
        """Its shape."""
        return self.tensor.shape

    def pull(self, wanted: Range) -> torch.Tensor:
        """A range of it."""
        return self.get().narrow(wanted.dim, wanted.start, wanted.size)

    @staticmethod
    def of(tensor: torch.Tensor) -> Kept:
        """Small ones are copied; of others it is checked later that nobody wrote to them."""
        if tensor.nbytes <= SMALL:
            return Kept(tensor.clone(), 0)
        return Kept(tensor, 0 if tensor.is_inference() else tensor._version)

    def get(self) -> torch.Tensor:
        """The operand; raises `MismatchError` if it was overwritten since."""
        if self.tensor.nbytes > SMALL and not self.tensor.is_inference() and self.tensor._version != self.version:
            raise MismatchError(
                f"a tensor of shape {list(self.tensor.shape)} was written to after it had been combined with a result "
                "that is still being computed; use an operator out of place, or read the result first"
            )
        return self.tensor


def _replayed(func: Any) -> Any:
    """A view of memory that is laid out otherwise than it was when recorded may have to copy."""
    return aten.reshape.default if func in (aten.view.default, aten._unsafe_view.default) else func


def _whole(leaf: Any) -> Any:
    return leaf.whole() if isinstance(leaf, RecordedValue) else leaf.get() if isinstance(leaf, Kept) else leaf
