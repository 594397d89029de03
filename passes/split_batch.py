"""`split-batch`: classifier-free-guidance parallelism, the batch divided over the mesh dim `cfg`."""

from __future__ import annotations

from dataclasses import dataclass

from xdit_ir.cost import attention_mesh_dims, program_flops
from xdit_ir.errors import ParallelizeError
from xdit_ir.layout import Layout
from xdit_ir.mesh import Mesh
from xdit_ir.program import SPEC, Program
from xdit_ir.propagate import Propagation

# Dividing a batch at least nearly halves the work; a cut that leaves more than this divides something else.
WORTH = 0.9


@dataclass(frozen=True)
class SplitBatch:
    """Cut the batch of one input and let demand cut the others; the outputs are gathered. Numerics: exact."""

    mesh: Mesh
    name: str = "split-batch"

    def apply(self, program: Program) -> Program:
        """The program with the batch divided, of all choices of the leading input the one with the least work."""
        degree = self.mesh.size(("cfg",))
        if degree == 1:
            return program
        trial = Propagation(program, self.mesh)
        tried: list[tuple[int, int, int, Program]] = []
        for node in program.graph.nodes:
            if node.op != "placeholder" or not node.meta[SPEC].shape or not node.meta[SPEC].dtype.is_floating_point:
                continue
            shape = node.meta[SPEC].shape
            layout = Layout.whole(len(shape)).with_dims({0: self.mesh.divide(shape[0], ("cfg",))})
            result = trial.run({node.name: (layout,)})
            if "cfg" in attention_mesh_dims(result, self.mesh):
                continue
            tried.append((max(program_flops(result, self.mesh)), len(tried), shape[0], result))
        whole = program_flops(program, None)[0]
        if not tried or min(tried)[0] > WORTH * whole:
            raise ParallelizeError(_explain(degree, [size for _, _, size, _ in tried]))
        best = min(tried, key=lambda one: one[:2])
        if best[2] < degree:
            raise ParallelizeError(_explain(degree, [best[2]]))
        return best[3].replace(mesh=self.mesh)


def _explain(degree: int, sizes: list[int]) -> str:
    batch = min(sizes, default=0)
    if batch >= degree:
        return (
            f"cfg={degree} divides the batch, but cutting the first dimension of no input divides the work (are "
            "samples packed into one sequence?); use cfg=1 with ulysses or ring"
        )
    return (
        f"cfg={degree} divides the batch, but the example has a batch of {batch}: "
        f"give at least {degree} samples (conditional and unconditional), or use cfg={max(batch, 1)}"
    )
