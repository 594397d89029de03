"""The order of passes, and legality of degrees."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from xdit_ir.errors import ParallelizeError
from xdit_ir.ir.mesh import TIME, Mesh
from xdit_ir.ir.program import Program
from xdit_ir.passes.base import Pass, run_passes
from xdit_ir.passes.canonicalize import Canonicalize
from xdit_ir.passes.compose_attention import ComposeAttention
from xdit_ir.passes.displace_patches import DisplacePatches
from xdit_ir.passes.divide_conditions import DivideConditions
from xdit_ir.passes.find_tokens import FindTokens
from xdit_ir.passes.group_keys import GroupKeys
from xdit_ir.passes.lower_attention import LowerAttention
from xdit_ir.passes.order_exchanges import OrderExchanges
from xdit_ir.passes.overlap import Overlap
from xdit_ir.passes.partition_stages import PartitionStages
from xdit_ir.passes.separate_time import SeparateTime
from xdit_ir.passes.shard_tokens import ShardTokens
from xdit_ir.passes.split_batch import SplitBatch
from xdit_ir.passes.split_joins import SplitJoins
from xdit_ir.passes.split_statistics import SplitStatistics
from xdit_ir.passes.take_known import TakeKnown
from xdit_ir.pipefusion.pipeline_program import Pipeline, verify_pipeline
from xdit_ir.sharding.machine import H100, Machine
from xdit_ir.sharding.verify import verify

After = Callable[[Pass, Program], None]


def analysis_passes() -> list[Pass]:
    """Passes that do not depend on the mesh."""
    return [Canonicalize(), TakeKnown(), ComposeAttention(), GroupKeys(), FindTokens()]


def mesh_passes(mesh: Mesh, machine: Machine = H100, *, split_batch: bool = True) -> list[Pass]:
    """Passes that divide a program over a mesh; `specialize` follows, per rank."""
    batch: list[Pass] = [SplitBatch(mesh)] if split_batch else []
    return [
        *batch,
        ShardTokens(mesh, machine),
        LowerAttention(mesh, machine),
        SplitStatistics(),
        DivideConditions(mesh, machine),
        OrderExchanges(),
        SplitJoins(),
        Overlap(mesh, machine),
    ]


def divide(
    program: Program, mesh: Mesh, machine: Machine = H100, after: After | None = None, *, split_batch: bool = True
) -> Program:
    """Run the mesh passes over an analysed program and verify that ranks can run the result."""
    divided = run_passes(program, mesh_passes(mesh, machine, split_batch=split_batch), after)
    verify(divided, "the last pass", runnable=True)
    return divided


def time_passes(mesh: Mesh, machine: Machine = H100, *, split_batch: bool = True) -> list[Pass]:
    """Passes that divide a program with stages over a mesh whose dim `pipefusion` counts patches."""
    tokens: Pass = DisplacePatches(mesh) if mesh.size((TIME,)) > 1 else ShardTokens(mesh, machine)
    batch: list[Pass] = [SplitBatch(mesh)] if split_batch else []
    return [*batch, tokens, LowerAttention(mesh, machine), SplitStatistics(), SeparateTime(mesh)]


def make_pipeline(
    program: Program,
    mesh: Mesh,
    patches: int,
    warmup_steps: int = 1,
    stages: Sequence[int] | None = None,
    machine: Machine = H100,
    after: After | None = None,
    *,
    split_batch: bool = True,
) -> tuple[Program, Pipeline]:
    """The analysed program with its stages noted, and the pipeline made from it, verified."""
    given = None if stages is None else tuple(stages)
    staged = run_passes(program, [PartitionStages(mesh.size((TIME,)), given, machine)], after)
    passes = time_passes(mesh.resized(TIME, patches), machine, split_batch=split_batch)
    divided = run_passes(staged, passes, after)
    verify(divided, "separate-time", runnable=True)
    pipeline = Pipeline(divided, divided.coordinates, warmup_steps)
    verify_pipeline(pipeline)
    return staged, pipeline


def check_schedule(pipefusion: int, patches: int | None, warmup_steps: int, stages: Sequence[int] | None) -> int:
    """The number of patches; raises `ParallelizeError` for settings that mean nothing."""
    if pipefusion == 1:
        if patches not in (None, 1) or stages is not None:
            raise ParallelizeError(f"patches={patches}, stages={stages} need pipefusion > 1; leave them out")
        return 1
    for name, value in (("patches", pipefusion if patches is None else patches), ("warmup_steps", warmup_steps)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ParallelizeError(f"{name}={value!r} is not a positive integer; the nearest legal one is {name}=1")
    return pipefusion if patches is None else patches
