"""What `torch.func` differentiates while a model is traced, which happens in inference mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch._functorch import eager_transforms

NESTINGS = ("grad_increment_nesting", "jvp_increment_nesting")
Nesting = Callable[[], AbstractContextManager[Any]]


@contextmanager
def recorded_derivatives() -> Iterator[None]:
    """Leave inference mode within `torch.func.grad` and its like where these would give zeros there."""
    before = {name: getattr(eager_transforms, name) for name in NESTINGS} if _are_zeros() else {}
    try:
        for name, nesting in before.items():
            setattr(eager_transforms, name, _left(nesting))
        yield
    finally:
        for name, nesting in before.items():
            setattr(eager_transforms, name, nesting)


def _left(nesting: Nesting) -> Nesting:
    @contextmanager
    def nested() -> Iterator[Any]:
        with torch.inference_mode(False), torch.no_grad(), nesting() as level:
            yield level

    return nested


@lru_cache(maxsize=1)
def _are_zeros() -> bool:
    """Whether this version of PyTorch (2.11 does) takes nothing to depend on anything in inference mode."""
    with torch.inference_mode():
        found = torch.func.grad(lambda x: (x * x).sum())(torch.ones(1, device="cpu"))
    return not bool(found.any())
