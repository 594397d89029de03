"""`split-batch`: classifier-free-guidance parallelism, the batch divided over the mesh dim `cfg`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from xdit_ir.cost import program_flops
from xdit_ir.errors import ParallelizeError
from xdit_ir.layout import Layout
from xdit_ir.mesh import Mesh
from xdit_ir.passes.find_tokens import divides
from xdit_ir.passes.streams import leading_values
from xdit_ir.program import SPEC, Program
from xdit_ir.propagate import Attempt, Propagation, Seeds

# Dividing a batch at least nearly halves the work; a cut that leaves more than this divides something else.
WORTH = 0.9
# More cuts are looked for where the work exceeds a fair share by more than this, and kept where they save so much.
BALANCED, FURTHER = 1.01, 0.995


@dataclass(frozen=True)
class _Choice:
    work: int
    size: int
    seeds: Seeds
    attempt: Attempt


@dataclass(frozen=True)
class SplitBatch:
    """Cut the batch of one input and let demand cut the others; the outputs are gathered. Numerics: exact.

    A batch that the model takes apart and puts together again is cut once more behind that, and before.
    """

    mesh: Mesh
    name: str = "split-batch"

    def apply(self, program: Program) -> Program:
        """The program with the batch divided, of all choices of the leading input the one with the least work."""
        degree = self.mesh.size(("cfg",))
        if degree == 1:
            return program
        trial = Propagation(program, self.mesh)
        values = [node for node in leading_values(program.graph) if node.meta[SPEC].shape]
        inputs = [node for node in program.graph.nodes if node in values and node.op == "placeholder"]
        tried = [choice for node in inputs if (choice := self._tried(trial, node, {})) is not None]
        whole = program_flops(program, None)[0]
        best = min(tried, key=lambda one: one.work, default=None)
        if best is None or best.work > WORTH * whole:
            raise ParallelizeError(_explain(degree, [one.size for one in tried]))
        if best.size < degree:
            raise ParallelizeError(_explain(degree, [best.size]))
        for node in values:
            if best.work * degree <= BALANCED * whole:
                break
            if node.meta[SPEC].shape[0] == best.size and not divides(best.attempt, node.name, 0):
                more = self._tried(trial, node, best.seeds)
                best = more if more is not None and more.work <= FURTHER * best.work else best
        return best.attempt.program().replace(mesh=self.mesh)

    def _tried(self, trial: Propagation, node: fx.Node, seeds: Seeds) -> _Choice | None:
        """The choice to cut this value too, unless that divides queries or keys."""
        shape = node.meta[SPEC].shape
        layout = Layout.whole(len(shape)).with_dims({0: self.mesh.divide(shape[0], ("cfg",))})
        seeds = {**seeds, node.name: (layout,)}
        result = trial.attempt(seeds)
        if "cfg" in result.attention_mesh_dims("queries", "keys"):
            return None
        return _Choice(max(result.flops()), shape[0], seeds, result)


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
