"""What users declare of their own operators: which dimensions of tensors belong together, and how much work it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch._ops import OpOverload, OpOverloadPacket

ELLIPSIS = "..."
_KEY = "__xdit_ir__"  # of the operator itself, so that it is declared as long as it exists
Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Declaration:
    """Labels of the dims of every tensor argument (by name) and of the results; those in `whole` are not divided.

    `sizes` are arguments that say how long the dim of a label is. `sums`: what is computed of parts of a dim that
    results lack adds up to the result. `flops` is the work by the sizes of all labels.
    """

    operands: Mapping[str, tuple[str, ...]]
    results: tuple[tuple[str, ...], ...]
    whole: frozenset[str]
    sizes: Mapping[str, str]
    sums: bool
    flops: Callable[[Sizes], float] | None

    def label(self, dims: tuple[str, ...], count: int) -> tuple[Any, ...] | None:
        """A label for each of `count` dims, those under an ellipsis counted from behind; None where they do not fit."""
        if ELLIPSIS not in dims:
            return dims if len(dims) == count else None
        at, many = dims.index(ELLIPSIS), count - len(dims) + 1
        return None if many < 0 else (*dims[:at], *((ELLIPSIS, i - many) for i in range(many)), *dims[at + 1 :])

    def work(self, shapes: Sequence[tuple[int, ...]], out: tuple[int, ...]) -> int:
        """FLOPs for operands and a first result of these shapes."""
        sizes: dict[str, int] = {}
        for dims, shape in zip((*self.operands.values(), self.results[0]), (*shapes, out), strict=False):
            for name, size in zip(self.label(dims, len(shape)) or (), shape, strict=False):
                key = name if isinstance(name, str) else ELLIPSIS
                sizes[key] = max(sizes.get(key, 1), size) if isinstance(name, str) else sizes.get(key, 1) * size
        return 0 if self.flops is None else int(self.flops(sizes))


def declare(packet: OpOverloadPacket[Any, Any], declaration: Declaration) -> None:
    """Remember what is declared of an operator, in place of what was."""
    vars(packet)[_KEY] = declaration


def declaration_of(target: Any) -> Declaration | None:
    """What is declared of an operator."""
    packet = target.overloadpacket if isinstance(target, OpOverload) else target
    found = vars(packet).get(_KEY) if isinstance(packet, OpOverloadPacket) else None
    return found if isinstance(found, Declaration) else None
