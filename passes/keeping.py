"""Where ranks keep weights, if not all of them on their GPU: options of `parallelize` and `port`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from xdit_ir.errors import ParallelizeError
from xdit_ir.ir.mesh import BATCH, TIME, Mesh
from xdit_ir.passes.split_batch import Batch


@dataclass(frozen=True)
class Keeping:
    """`shard`: each rank has an equal part; `stream`: what a rank has lies in the host's memory, in equal parts too."""

    shard: bool = False
    stream: bool = False

    @staticmethod
    def of(mesh: Mesh, shard: object = False, stream: object = False, *, batch: Batch = Batch.DIVIDED) -> Keeping:
        """From the options.

        Raises:
            ParallelizeError: they are no options, stages have weights of their own, or no two ranks hold copies of
                what one call needs.
        """
        for name, wanted in (("shard_weights", shard), ("stream_weights", stream)):
            if not isinstance(wanted, bool):
                raise ParallelizeError(f"{name}={wanted!r}: expected True or False")
            if wanted and mesh.size((TIME,)) > 1:
                raise ParallelizeError(
                    f"{name}=True with {TIME}={mesh.size((TIME,))}: stages have weights of their own already; expected "
                    f"{TIME}=1, nearest legal: {BATCH}, ulysses or ring instead of {TIME}, or {name}=False"
                )
        if shard and batch is Batch.CALLS and mesh.world_size == mesh.size((BATCH,)) > 1:
            raise ParallelizeError(
                f"shard_weights=True with {BATCH}={mesh.size((BATCH,))} that divides calls, as here the batch cannot "
                f"be divided: its ranks run different calls, so none can gather from the other; use ulysses=2"
            )
        return Keeping(bool(shard), bool(stream))

    @property
    def options(self) -> Mapping[str, bool]:
        """Those that are not as usual, by name."""
        given = {"shard_weights": self.shard, "stream_weights": self.stream}
        return {name: wanted for name, wanted in given.items() if wanted}

    def gives_up(self, mesh: Mesh) -> bool:
        """Whether ranks have copies of weights, so that a model is to give its own up."""
        return self.stream or (self.shard and mesh.world_size > 1)


ALL_HERE = Keeping()
