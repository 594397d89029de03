"""Which degrees the passes refuse for a model, as far as it shows before a program is divided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xdit_ir.degrees import Degrees
from xdit_ir.errors import ParallelizeError
from xdit_ir.ir.mesh import BATCH, Mesh
from xdit_ir.ir.program import Program
from xdit_ir.passes.base import run_passes
from xdit_ir.passes.divide import check_degrees
from xdit_ir.passes.split_batch import Batch, SplitBatch
from xdit_ir.planning.candidates import batch_degrees

# Calls that are run at a time where halves of `cfg` run different ones.
PAIR = 2


@dataclass(frozen=True)
class Legality:
    """Of an analysed program. `pairs`: where the batch cannot be divided, two halves of `cfg` run two calls."""

    analysed: Program
    pairs: bool

    def refusals(self, sets: Sequence[Degrees]) -> dict[Degrees, str]:
        """Why each cannot be; empty where it may."""
        batch: dict[int, str] = {}
        for size in batch_degrees(sets):  # larger ones are illegal likewise
            paired = self.pairs and size == PAIR
            batch[size] = "" if paired else next((why for why in batch.values() if why), "") or self.of_batch(size)
        return {one: batch.get(one.mesh.degrees[BATCH], "") or self._of_mesh(one.mesh) for one in sets}

    def of_batch(self, size: int) -> str:
        """Why the batch cannot be divided so; empty if it can."""
        try:
            run_passes(self.analysed, [SplitBatch(Mesh.of(**{BATCH: size}))], familiar=True)
        except ParallelizeError as error:
            return str(error)
        return ""

    def _of_mesh(self, mesh: Mesh) -> str:
        try:
            check_degrees(self.analysed, mesh, batch=Batch.CALLS if self.pairs else Batch.DIVIDED)
        except ParallelizeError as error:
            return str(error)
        return ""
