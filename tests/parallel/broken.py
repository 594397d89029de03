"""Jobs in which one rank's runtime is broken on purpose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import jobs  # type: ignore[import-not-found]
import torch

import xdit_ir as xir
from xdit_ir.transport import collectives, packing, wire

# What is broken, on rank 1, the model that shows it, and its degrees.
RUNTIMES = {
    "pieces to the wrong ranks": ("pixart-sigma", {"ulysses": 2}),
    "own summand only": ("sana-1600m", {"ulysses": 2}),
}


@contextmanager
def _broken(how: str) -> Iterator[None]:
    cut = packing.cut

    def reverse(x: torch.Tensor, takes: Any) -> list[torch.Tensor]:
        return cut(x, takes)[::-1]

    def own(x: torch.Tensor, *, group: str) -> torch.Tensor:
        """Takes part, so that the other ranks do not wait for ever."""
        total = wire.wait(torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", group))
        return x + 0 * total

    target: Any = {
        "pieces to the wrong ranks": (packing, "cut", reverse),
        "own summand only": (collectives.AllReduce, "function", staticmethod(own)),
    }[how]
    with patch.object(*target):
        yield


def broken_runtime(how: str) -> dict[str, float]:
    """Errors of the output before and after rank 1's runtime is broken."""
    name, degrees = RUNTIMES[how]
    model, example, want = jobs._load(name)
    module = xir.trace(model, example).parallelize(**degrees).emit(model)
    with torch.no_grad():
        before = jobs.relative_error(module(**example), want)
        if jobs._rank() == 0:
            return {"before": before, "after": jobs.relative_error(module(**example), want)}
        with _broken(how):
            return {"before": before, "after": jobs.relative_error(module(**example), want)}


def other_program() -> dict[str, Any]:
    """Rank 1 has another program than rank 0."""
    model, example, _ = jobs._load("pixart-sigma")
    degrees = {"ring": 2} if jobs._rank() else {"ulysses": 2}
    result: dict[str, Any] = jobs._failure(
        lambda: xir.trace(model, example).parallelize(**degrees).emit(model)(**example)
    )
    return result
