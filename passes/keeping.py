"""Where ranks keep weights, if not all of them on their GPU: options of `parallelize` and `port`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from xdit_ir.errors import ParallelizeError
from xdit_ir.ir.mesh import BATCH, MESH_DIMS, TIME, Mesh
from xdit_ir.passes.split_batch import Batch

UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "GB": 10**9, "MB": 10**6}
AMOUNT = re.compile(rf"(\d+(?:\.\d+)?) ?({'|'.join(UNITS)})")


@dataclass(frozen=True)
class Keeping:
    """`shard`: each rank has an equal part; `stream`: what a rank has lies in the host's memory, in equal parts too,
    but for `resident` bytes at most, which stay on its GPU. Parts are those of ranks that differ `along` these mesh
    dims only; empty: along all."""

    shard: bool = False
    stream: bool = False
    resident: int = 0
    along: tuple[str, ...] = ()

    @staticmethod
    def of(shard: object = False, stream: object = False) -> Keeping:
        """From the options; raises `ParallelizeError` for what is none."""
        along = () if isinstance(shard, bool) else _mesh_dims(shard)
        return Keeping(shard is not False, stream is not False, _bytes(stream), along)

    def check(self, mesh: Mesh, *, batch: Batch = Batch.DIVIDED) -> None:
        """Raise `ParallelizeError` where no two ranks hold copies of what one call needs."""
        paired = batch is Batch.CALLS
        legal = [one for one in mesh.dims_of_a_call(paired=paired) if mesh.size((one,)) > 1]
        if legal and self.along and mesh.size(mesh.dims_of_a_call(paired=paired, along=self.along)) == 1:
            degrees = ", ".join(f"{name}={size}" for name, size in mesh.degrees.items() if size > 1)
            raise ParallelizeError(
                f"{self.asked}: no two ranks that run the same call differ along it, with "
                f"{degrees}; nearest legal: shard_weights={legal[0]!r}, or shard_weights=True for all ranks"
            )
        if self.shard and mesh.world_size > 1 and mesh.size(mesh.dims_of_a_call(paired=False)) == 1:
            stages = mesh.size((TIME,))
            raise ParallelizeError(
                f"{self.asked} with {TIME}={stages} alone: each stage has weights of its own, of which no other "
                f"rank has a copy; nearest legal: ulysses=2 beside it, or shard_weights=False"
            )
        alone = mesh.size((BATCH,)) > 1 == mesh.size(mesh.dims_of_a_call(paired=True))
        if self.shard and paired and alone:
            raise ParallelizeError(
                f"{self.asked} with {BATCH}={mesh.size((BATCH,))} that divides calls, as here the batch cannot be "
                f"divided: its ranks run different calls, so none can gather from the other; use ulysses=2"
                f"{' beside it, or stream_weights=True alone' if self.stream else ''}"
            )

    def joined(self, other: Keeping) -> Keeping:
        """What either asks for."""
        resident, along = self.resident or other.resident, self.along or other.along
        return Keeping(self.shard or other.shard, self.stream or other.stream, resident, along)

    @property
    def asked(self) -> str:
        """The option `shard_weights` as it was given, for people."""
        return f"shard_weights={'+'.join(self.along) or True!r}"

    @property
    def everywhere(self) -> Keeping:
        """The same for a module whose ranks differ in other ways: over all of them, and nothing stays."""
        return replace(self, along=(), resident=0)

    @property
    def streamed(self) -> bool | int:
        """The option `stream_weights`."""
        return self.resident or self.stream

    @property
    def options(self) -> Mapping[str, Any]:
        """Those that are not as usual, by name."""
        given = {"shard_weights": self.along or self.shard, "stream_weights": self.streamed}
        return {name: wanted for name, wanted in given.items() if wanted}

    def gives_up(self, mesh: Mesh) -> bool:
        """Whether ranks have copies of weights, so that a model is to give its own up."""
        return self.stream or (self.shard and mesh.size(mesh.dims_of_a_call(paired=False, along=self.along)) > 1)


def amount(text: str) -> int | None:
    """The bytes that a text with a unit says, such as `20GiB`; None for another one."""
    found = AMOUNT.fullmatch(text)
    return int(float(found[1]) * UNITS[found[2]]) if found else None


def _mesh_dims(shard: object) -> tuple[str, ...]:
    """Those that `shard_weights` names, as `"ring"`, `"ulysses+ring"` or a sequence."""
    names = shard.split("+") if isinstance(shard, str) else shard
    legal = [name for name in MESH_DIMS if name != TIME]
    expected = (
        f"shard_weights={shard!r}: expected True or False, or mesh dims along which weights are divided, of "
        f"{', '.join(legal)}"
    )
    if not isinstance(names, Sequence) or not names or not all(isinstance(name, str) for name in names):
        raise ParallelizeError(f"{expected}, such as shard_weights='ulysses'")
    for name in names:
        if name not in legal:
            near = difflib.get_close_matches(name, legal, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            hint = "; stages have weights of their own" if name == TIME else hint
            raise ParallelizeError(f"{expected}; {name!r} is none of them{hint}")
    return tuple(name for name in legal if name in names)


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
