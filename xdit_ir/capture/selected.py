"""What a trace knows of rows that masks of unknown contents select."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from xdit_ir.reflection.tensors import tensors_in

NUMBER = "selection"  # in the metadata of a `where` that keeps what a mask selects: the mask's number
_DEEP = 8


@dataclass(eq=False)
class Selections:
    """Those of one trace: masks by number, those taken to be `empty`, and those of which Python `asked`; `rows` are the
    tensors of selected rows, with the number of the mask, and `place` is where the first were selected."""

    empty: frozenset[int] = frozenset()
    asked: set[int] = field(default_factory=set)
    rows: dict[int, tuple[torch.Tensor, int]] = field(default_factory=dict)
    place: str = ""
    _masks: list[str] = field(default_factory=list)

    def number(self, mask: fx.Node) -> int:
        """The number of a mask, the same for what is computed alike."""
        key = _meaning(mask, _DEEP)
        if key not in self._masks:
            self._masks.append(key)
        return self._masks.index(key)

    def of(self, tree: Any) -> set[int]:
        """The masks of the selected rows in an operator's arguments."""
        return {self.rows[id(tensor)][1] for tensor in tensors_in(tree) if id(tensor) in self.rows}

    @property
    def cases(self) -> list[frozenset[int]]:
        """What is to be made sure of: each mask empty that was asked for, and all."""
        each = [frozenset({number}) for number in sorted(self.asked)]
        return each + ([frozenset(self.asked)] if len(each) > 1 else [])


def _meaning(node: fx.Node, depth: int) -> str:
    if depth == 0 or node.op != "call_function":
        return f"{node.name} {id(node)}"
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda item: _Operand(_meaning(item, depth - 1)))
    return repr((str(node.target), args, kwargs))


class _Operand(str):
    """Stands for an operand."""

    __slots__ = ()
