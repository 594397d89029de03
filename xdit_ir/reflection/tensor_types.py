"""Have tensors become others, in all but their contents? Told by one call into PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._C._dynamo import guards

_GUARDS: Any = getattr(guards, "TensorGuards", None)  # of a torch without, every tensor may have changed


class TensorTypes:
    """Classes, dtypes, devices, shapes and strides of some tensors, and whether they require gradients."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        made = _GUARDS and _GUARDS(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        self._check = made.check if made else None

    def same(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether these have the same; never known where PyTorch is in another mode than when this was made."""
        return self._check is not None and bool(self._check(*tensors))
