"""Modules of code without parameters: a function of tensors, and what is fixed of its arguments."""

from __future__ import annotations

from typing import Any

from torch import nn


class FixedCall(nn.Module):
    """`function`, called with the operands of a node and with `fixed`: keyword arguments that are numbers, texts, types
    and tuples of them, so that code can be written with others in their place."""

    fixed: dict[str, Any]

    @staticmethod
    def function(*operands: Any, **named: Any) -> Any:
        """What is done."""
        raise NotImplementedError

    def forward(self, *operands: Any, **named: Any) -> Any:
        """The function of these operands."""
        return self.function(*operands, **named, **self.fixed)
