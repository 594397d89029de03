"""Where ranks keep weights, if not all of them on their GPU: options of `parallelize` and `port`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from xdit_ir.errors import ParallelizeError
from xdit_ir.ir.mesh import BATCH, TIME, Mesh
from xdit_ir.passes.split_batch import Batch

UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "GB": 10**9, "MB": 10**6}
AMOUNT = re.compile(rf"(\d+(?:\.\d+)?) ?({'|'.join(UNITS)})")


@dataclass(frozen=True)
class Keeping:
    """`shard`: each rank has an equal part; `stream`: what a rank has lies in the host's memory, in equal parts too,
    but for `resident` bytes at most, which stay on its GPU."""

    shard: bool = False
    stream: bool = False
    resident: int = 0

    @staticmethod
    def of(shard: object = False, stream: object = False) -> Keeping:
        """From the options; raises `ParallelizeError` for what is none."""
        if not isinstance(shard, bool):
            raise ParallelizeError(f"shard_weights={shard!r}: expected True or False")
        return Keeping(shard, stream is not False, _bytes(stream))

    def check(self, mesh: Mesh, *, batch: Batch = Batch.DIVIDED) -> None:
        """Raise `ParallelizeError` where no two ranks hold copies of what one call needs."""
        if self.shard and mesh.world_size > 1 and mesh.size(mesh.dims_of_a_call(paired=False)) == 1:
            stages = mesh.size((TIME,))
            raise ParallelizeError(
                f"shard_weights=True with {TIME}={stages} alone: each stage has weights of its own, of which no other "
                f"rank has a copy; nearest legal: ulysses=2 beside it, or shard_weights=False"
            )
        alone = mesh.size((BATCH,)) > 1 == mesh.size(mesh.dims_of_a_call(paired=True))
        if self.shard and batch is Batch.CALLS and alone:
            raise ParallelizeError(
                f"shard_weights=True with {BATCH}={mesh.size((BATCH,))} that divides calls, as here the batch cannot "
                f"be divided: its ranks run different calls, so none can gather from the other; use ulysses=2"
            )

    def joined(self, other: Keeping) -> Keeping:
        """What either asks for."""
        return Keeping(self.shard or other.shard, self.stream or other.stream, self.resident or other.resident)

    @property
    def streamed(self) -> bool | int:
        """The option `stream_weights`."""
        return self.resident or self.stream

    @property
    def options(self) -> Mapping[str, bool | int]:
        """Those that are not as usual, by name."""
        given = {"shard_weights": self.shard, "stream_weights": self.streamed}
        return {name: wanted for name, wanted in given.items() if wanted}

    def gives_up(self, mesh: Mesh) -> bool:
        """Whether ranks have copies of weights, so that a model is to give its own up."""
        return self.stream or (self.shard and mesh.size(mesh.dims_of_a_call(paired=False)) > 1)


def amount(text: str) -> int | None:
    """The bytes that a text with a unit says, such as `20GiB`; None for another one."""
    found = AMOUNT.fullmatch(text)
    return int(float(found[1]) * UNITS[found[2]]) if found else None


def _bytes(stream: object) -> int:
    """What `stream_weights` lets stay on the GPU."""
    if isinstance(stream, bool):
        return 0
    if isinstance(stream, str) and (found := amount(stream)) is not None:
        return found
    if isinstance(stream, int) and stream > 0:
        return stream
    raise ParallelizeError(
        f"stream_weights={stream!r}: expected True or False, or how much may stay on the GPU, such as "
        f"stream_weights='20GiB' ({', '.join(UNITS)}, or a number of bytes)"
    )


ALL_HERE = Keeping()
