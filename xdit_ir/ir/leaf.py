"""Opaque leaves: submodules that cannot be captured, called as they are at run time.

A leaf is the target of one node, `leaf([inputs], [state])`; state goes in under the names that the module gives it,
so that layers may share a body and weights stay by reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from xdit_ir.errors import MismatchError
from xdit_ir.ir.program import TensorSpec


@dataclass(frozen=True, eq=False)
class Leaf:
    """One submodule: how tensors make up its arguments, what it returns, and which dims it treats one by one.

    `leaves` are the flattened arguments, with None for tensors, of which `unflatten` makes arguments; `flatten` finds
    tensors in what is returned; `state` are the names of its parameters and buffers. `aligned` has, for every dim of
    the results along which each index is computed from the same index of operands alone, the operands that are divided
    with it. `cast` is the autocast in force, by device type. `orders` has the dims of each input in the order in which
    they lie in memory in the model, on which views and random numbers depend; `draws`: it was seen to draw these.
    """

    module: nn.Module
    reason: str
    leaves: tuple[Any, ...]
    in_spec: pytree.TreeSpec
    state: tuple[str, ...]
    outputs: tuple[TensorSpec, ...]
    unflatten: Callable[[list[Any], pytree.TreeSpec], Any]
    flatten: Callable[[Any], list[torch.Tensor]]
    flops: int = 0
    aligned: tuple[tuple[int, tuple[int, ...]], ...] = ()
    cast: tuple[str, torch.dtype] | None = None
    orders: tuple[tuple[int, ...], ...] = ()
    draws: bool = False

    @property
    def __name__(self) -> str:
        """As of a function, for the names of nodes."""
        return f"leaf_{type(self.module).__name__}"

    @property
    def single(self) -> bool:
        """Whether the result is one tensor, and not a tuple of them."""
        return len(self.outputs) == 1

    def run(self, inputs: Sequence[torch.Tensor], state: Sequence[torch.Tensor]) -> Any:
        """What the module returns."""
        feed = map(_in_order, inputs, self.orders)
        leaves = [next(feed) if isinstance(leaf, TensorSpec) else leaf for leaf in self.leaves]
        args, kwargs = self.unflatten(leaves, self.in_spec)
        held = dict(zip(self.state, state, strict=True))
        if self.cast is None:
            return torch.func.functional_call(self.module, held, args, kwargs)
        with torch.autocast(self.cast[0], dtype=self.cast[1]):
            return torch.func.functional_call(self.module, held, args, kwargs)

    def __call__(self, inputs: Sequence[torch.Tensor], state: Sequence[torch.Tensor]) -> Any:
        tensors = self.flatten(self.run(inputs, state))
        if len(tensors) != len(self.outputs):
            raise MismatchError(f"{self.__name__} returned {len(tensors)} tensors, expected {len(self.outputs)}")
        divisible = {dim for dim, _ in self.aligned}
        for tensor, spec in zip(tensors, self.outputs, strict=True):
            sizes = [
                (a, b) for d, (a, b) in enumerate(zip(tensor.shape, spec.shape, strict=False)) if d not in divisible
            ]
            if tensor.dtype != spec.dtype or tensor.dim() != len(spec.shape) or any(a != b for a, b in sizes):
                raise MismatchError(
                    f"{self.__name__} returned {tensor.dtype}{list(tensor.shape)}, "
                    f"expected {spec.dtype}{list(spec.shape)}"
                )
        return tensors[0] if self.single else tuple(tensors)


def order_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """The dims of a tensor, the one whose elements are the furthest apart in memory first."""
    strides = tensor.stride()
    return tuple(sorted(range(tensor.dim()), key=lambda dim: -strides[dim]))


def _in_order(tensor: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """The same numbers, without gaps and with the dims in this order in memory."""
    moved = tensor.permute(order)
    if moved.is_contiguous():
        return tensor
    back = sorted(range(len(order)), key=order.__getitem__)
    return moved.contiguous().permute(back)
