"""Was a tensor written to? Also where PyTorch does not count it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import Parameter

from xdit_ir.emission.execution import Tensors
from xdit_ir.runtime.agreement import versions

FEW = 16  # elements of a tensor, side by side
KEPT = 2  # sets of tensors: those of two programs
_PLAIN = (torch.Tensor, Parameter)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(eq=False)
class Glimpses:
    """Views of a few elements of each tensor of the last few sets, by where these lie."""

    _views: dict[tuple[int, ...], list[list[torch.Tensor]]] = field(default_factory=dict)

    def of(self, tensors: Tensors, places: Sequence[int]) -> list[torch.Tensor]:
        """The bits of a few elements of those on the CPU."""
        key = tuple(places)
        found = self._views.pop(key, None)
        self._views[key] = views = _grouped(tensors) if found is None else found
        while len(self._views) > KEPT:
            del self._views[next(iter(self._views))]
        return [torch.cat(group) for group in views]


class Unwritten:
    """Tensors as they are now. PyTorch counts writes to a tensor, and tells of other memory. What is written through
    `.data` or NumPy shows in a few elements, if not in a few places only; on the CPU, where they are quickly read."""

    def __init__(self, tensors: Tensors, glimpses: Glimpses) -> None:
        self._tensors, self._glimpses = tensors, glimpses
        self._versions, self._places = versions(tensors), _places(tensors)
        self._bits = glimpses.of(tensors, self._places)

    def holds(self) -> bool:
        """Whether they are as they were."""
        if versions(self._tensors) != self._versions or _places(self._tensors) != self._places:
            return False
        return all(map(torch.equal, self._glimpses.of(self._tensors, self._places), self._bits))


def _places(tensors: Tensors) -> list[int]:
    """Where they lie, which changes where they are given other memory."""
    return [x.data_ptr() if type(x) in _PLAIN else 0 for x in tensors]


def _grouped(tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Views of a few elements, those of a size together."""
    groups: dict[int, list[torch.Tensor]] = {}
    with torch.no_grad():
        for x in (x for x in tensors if type(x) in _PLAIN and x.device.type == "cpu"):
            dense = x.detach().permute(sorted(range(x.dim()), key=x.stride, reverse=True))
            if x.itemsize in _BITS and x.numel() and dense.is_contiguous():
                some = dense.view(_BITS[x.itemsize]).view(-1)[x.numel() // 2 :][:FEW]
                groups.setdefault(x.itemsize, []).append(some)
    return list(groups.values())
