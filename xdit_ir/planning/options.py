"""What a plan is asked for: options, and what of them is refused before anything is worked out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from xdit_ir.degrees import Degrees
from xdit_ir.errors import ParallelizeError
from xdit_ir.ir.mesh import Mesh
from xdit_ir.passes.keeping import UNITS, amount
from xdit_ir.planning.candidates import degree_sets
from xdit_ir.planning.hardware import GIB
from xdit_ir.transport.replicas import checked_data

# GPUs of one replica; what is exchanged is worked out for each pair of them.
MOST = 256
# GiB that a GPU may have: what is more was meant as bytes.
LARGEST = 2**20


@dataclass(frozen=True)
class Options:
    """Those of `plan`, for what they mean; `features`: these may be divided where that is not given."""

    memory: float | None = None
    exact: bool = True
    flash: bool = False
    shard_weights: bool | None = None
    stream_weights: bool | int | None = None
    features: bool = True
    data: int | None = None
    kv_cache_dtype: str = "auto"

    def degree_sets(self, gpus: int, given: Mapping[str, int]) -> list[Degrees]:
        """For the GPUs of one replica."""
        return degree_sets(gpus, given, exact=self.exact, features=self.features)


def check_counts(gpus: int, given: Mapping[str, int], data: int | None) -> None:
    """Raise `ParallelizeError` for a number of GPUs, degrees or replicas that is none, or does not divide the GPUs."""
    Mesh.of(**given)
    if not isinstance(gpus, int) or isinstance(gpus, bool) or gpus < 1:
        raise ParallelizeError(f"gpus={gpus!r}: expected a positive number, such as 8")
    if data is not None and gpus % checked_data(data):
        near = max(size for size in range(1, gpus + 1) if gpus % size == 0 and size <= data)
        raise ParallelizeError(f"data={data} does not divide {gpus} GPUs; nearest legal: data={near}")
    if gpus // (data or 1) > MOST:
        near = min(size for size in range(1, gpus + 1) if gpus % size == 0 and gpus // size <= MOST)
        raise ParallelizeError(
            f"gpus={gpus}: a plan goes up to {MOST} GPUs for one replica; share them out, nearest legal: data={near}"
        )


def check_options(**flags: Any) -> None:
    """Raise `ParallelizeError` for what is neither True nor False."""
    for name, value in flags.items():
        if not isinstance(value, bool) and not (value is None and name == "shard_weights"):
            hint = "; mesh dims are for `port`, with all degrees given" if name == "shard_weights" else ""
            raise ParallelizeError(f"{name}={value!r}: expected True or False{hint}")


def gib_of(memory: Any) -> float | None:
    """What `memory` says, in GiB."""
    gib = (amount(memory) or 0) / GIB if isinstance(memory, str) else memory
    if gib is None:
        return None
    if not isinstance(gib, (int, float)) or isinstance(gib, bool) or not 0 < gib <= LARGEST:
        raise ParallelizeError(
            f"memory={memory!r}: expected GiB that a GPU may use, such as 80, or a text with a unit, such as '80GB' "
            f"({', '.join(UNITS)}); at most {LARGEST} GiB"
        )
    return float(gib)
