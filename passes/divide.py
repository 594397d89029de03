"""From an analysed program to one divided over a mesh, or to a pipeline."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from xdit_ir.caching.cut import cut_cached
from xdit_ir.caching.decision import REGION
from xdit_ir.caching.rule import CacheRule
from xdit_ir.errors import ParallelizeError
from xdit_ir.ir.mesh import BATCH, FEATURES, SEQUENCE, TIME, Mesh
from xdit_ir.ir.program import SPEC, Program, call_parts
from xdit_ir.passes.base import After, run_passes
from xdit_ir.passes.cast_kv_cache import kv_cache_dtype as stored_dtype
from xdit_ir.passes.keeping import ALL_HERE, Keeping
from xdit_ir.passes.order import cache_passes, mesh_passes, time_passes
from xdit_ir.passes.partition_stages import PartitionStages
from xdit_ir.passes.patch_count import cheapest
from xdit_ir.passes.split_batch import LARGE, Batch, check_batch
from xdit_ir.pipefusion.pipeline_program import Pipeline, verify_pipeline
from xdit_ir.sharding.branches import draws
from xdit_ir.sharding.machine import H100, Machine, program_work

WORTH = 0.9  # of a step's work: a cache that leaves more to do is of no use
SHOWN = 2  # places of caches that are named
MAY_IDLE = 8  # ranks: on one host some of them may go without tokens, which the report says


def divide(
    program: Program,
    mesh: Mesh,
    machine: Machine = H100,
    after: After | None = None,
    *,
    batch: Batch = Batch.DIVIDED,
    familiar: bool = False,
    keeping: Keeping = ALL_HERE,
) -> Program:
    """Run the mesh passes over an analysed program: ranks can run the result."""
    check_degrees(program, mesh, batch=batch)
    passes = mesh_passes(mesh, machine, batch=batch, keeping=keeping, before=frozenset(program.stored))
    return run_passes(program, passes, after, familiar=familiar)


def check_cache(rule: CacheRule, mesh: Mesh, *, batch: Batch = Batch.DIVIDED) -> None:
    """Raise `ParallelizeError` where a step cache means nothing."""
    if rule.branchless and batch is Batch.CALLS:
        raise ParallelizeError(
            f"cache={rule.text!r}: a call reuses what the one before it gave, also for another branch of guidance, and "
            f"{BATCH}={mesh.size((BATCH,))} runs them on different ranks; expected {BATCH}=1, or a batch that it "
            f"divides; nearest legal: ulysses={mesh.size((BATCH,))}"
        )
    if (stages := mesh.size((TIME,))) > 1:
        raise ParallelizeError(
            f"cache={rule.text!r} with {TIME}={stages}: patches read what the last step left for them, also of the "
            f"blocks that a cache would leave out; expected {TIME}=1, nearest legal: ulysses={stages}, or no cache"
        )


def note_region(
    program: Program,
    rule: CacheRule,
    mesh: Mesh,
    machine: Machine = H100,
    after: After | None = None,
    *,
    batch: Batch = Batch.DIVIDED,
) -> Program:
    """An analysed program in which the region that a step cache leaves out is noted, if it is not marked already.

    Raises:
        ParallelizeError: the model has none that is worth it, or steps leave something for others already.
    """
    check_cache(rule, mesh, batch=batch)
    if program.signature.effects:
        raise ParallelizeError(
            f"cache={rule.text!r}: forward writes into what it is given (a cache of its own), which a step that leaves "
            "blocks out would not; expected a forward that only returns values, nearest legal: no cache"
        )
    if rule.groups:
        return program
    noted = run_passes(program, cache_passes(rule.watched), after)
    cut = cut_cached(noted)
    left = sum(program_work(one, machine) for one in (cut.head, cut.rest[REGION]) if one is not None)
    share = left / max(program_work(program, machine), 1)
    if share > WORTH:
        raise ParallelizeError(
            f"cache={rule.text!r}: a step that reuses the blocks of {program.name} would still do {share:.2f} of the "
            f"work; expected {WORTH} at most, nearest legal: no cache"
        )
    return noted


def make_pipeline(
    program: Program,
    mesh: Mesh,
    patches: int | None = None,
    warmup_steps: int = 1,
    stages: Sequence[int] | None = None,
    machine: Machine = H100,
    after: After | None = None,
    *,
    batch: Batch = Batch.DIVIDED,
    keeping: Keeping = ALL_HERE,
    kv_cache_dtype: str = "auto",
) -> tuple[Program, Pipeline]:
    """The analysed program with its stages noted, and the pipeline made from it, verified; `patches`: None for as many
    as there are stages, more where that takes less time on the machine (see `patch_count`), or the nearest smaller
    number that is legal, with a warning."""
    check_degrees(program, mesh, batch=batch)
    if where := draws(program):
        raise ParallelizeError(
            f"{TIME}={mesh.size((TIME,))}: forward draws random numbers ({where}), of which stages and patches would "
            f"draw others; expected noise that forward is given, nearest legal: ulysses={mesh.size((TIME,))}"
        )
    given = None if stages is None else tuple(stages)
    staged = run_passes(program, [PartitionStages(mesh.size((TIME,)), given, machine)], after)

    def pipeline(count: int) -> Pipeline:
        sized = mesh.resized(TIME, count)
        return _pipeline(staged, sized, warmup_steps, machine, after, batch, keeping, kv_cache_dtype)

    if left := _left_paths(staged):
        if patches != 1:
            warnings.warn(
                f"forward leaves tensors in {left}, where none may be stale: such a call takes patches=1, and is exact",
                stacklevel=3,
            )
        return staged, pipeline(1)
    if patches is not None:
        return staged, pipeline(patches)
    try:
        return staged, cheapest(pipeline(mesh.size((TIME,))), machine, pipeline)
    except ParallelizeError as refusal:
        if refusal.patches is None:
            raise
        slower = "; with one patch, stages divide the weights and not the time" if refusal.patches == 1 else ""
        warnings.warn(f"none were given: {refusal}, which is taken{slower}", stacklevel=3)
        return staged, pipeline(refusal.patches)


def _left_paths(program: Program) -> str:
    """Where forward leaves tensors, of which none may be stale; empty where it leaves none."""
    effects = [one for one in program.signature.effects if any(isinstance(leaf, int) for leaf in one.leaves)]
    shown = [f"{one.path[0].key}{''.join(map(str, one.path[1:]))}" for one in effects]
    return ", ".join(shown[:SHOWN]) + (f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else "")


def _pipeline(
    staged: Program,
    mesh: Mesh,
    warmup_steps: int,
    machine: Machine,
    after: After | None,
    batch: Batch,
    keeping: Keeping,
    kv_cache_dtype: str,
) -> Pipeline:
    """Of a program with stages, over a mesh whose dim `pipefusion` counts patches."""
    patches = mesh.size((TIME,))
    if patches > (most := _most_tokens(staged)):
        said = f"patches={patches} divide tokens, of which there are {most}; use at most {most}"
        raise ParallelizeError(said, patches=most)
    before = frozenset(staged.stored)
    passes = time_passes(mesh, machine, batch=batch, keeping=keeping, before=before, kv_cache_dtype=kv_cache_dtype)
    divided = run_passes(staged, passes, after)
    pipeline = Pipeline(divided, divided.coordinates, warmup_steps)
    verify_pipeline(pipeline)
    return pipeline


def check_degrees(program: Program, mesh: Mesh, *, batch: Batch = Batch.DIVIDED) -> None:
    """Raise `ParallelizeError` for more ranks than there is to divide, before anything is listed for each of them."""
    check_features(program, mesh)
    cfg, degree, most = mesh.size((BATCH,)), mesh.size(SEQUENCE), _most_tokens(program)
    if batch is Batch.DIVIDED:
        check_batch(program, cfg)
    elif cfg > LARGE:
        what = "runs as many calls of a step at once" if batch is Batch.CALLS else "shares samples"
        raise ParallelizeError(f"{BATCH}={cfg} {what}, and there are seldom so many; use at most {BATCH}={LARGE}")
    if degree > max(most, MAY_IDLE):
        given = {name: mesh.degrees[name] for name in SEQUENCE}
        name = max(given, key=lambda one: given[one])
        others = degree // given[name]
        legal = {**given, name: most // others} if others <= most else {name: most}
        raise ParallelizeError(
            f"{_said(given)} divides tokens, of which there are {most} at most; nearest legal: {_said(legal)}"
        )


def check_features(program: Program, mesh: Mesh) -> None:
    """Raise `ParallelizeError` where features cannot be divided over so many ranks, or not beside stages."""
    degree, [name] = mesh.size(FEATURES), FEATURES
    if degree > 1 and mesh.size((TIME,)) > 1:
        raise ParallelizeError(
            f"{name}={degree} with {TIME}={mesh.size((TIME,))}: stages divide weights already, and wait for no sums; "
            f"expected one of them to be 1, nearest legal: {name}={degree} with {BATCH}, ring or ulysses"
        )
    weights = (weight for call in program.calls for weight in call_parts(call).weights.values())
    most = max((size for weight in weights for size in weight.meta[SPEC].shape), default=1)
    if degree > max(most, MAY_IDLE):
        raise ParallelizeError(
            f"{name}={degree} divides features, of which there are {most} at most; nearest legal: {name}={most}"
        )


def _said(degrees: Mapping[str, int]) -> str:
    return " x ".join(f"{name}={size}" for name, size in degrees.items() if size > 1) or f"{SEQUENCE[0]}=1"


def _most_tokens(program: Program) -> int:
    """Of the longest stream that reaches queries; where there is none, of any dimension of an input."""
    inputs = (node.meta[SPEC] for node in program.graph.nodes if node.op == "placeholder")
    found = [axis.size for axis in program.tokens if not axis.is_context] or [
        size for spec in inputs for size in spec.shape
    ]
    return max(found, default=1)


def check_schedule(
    pipefusion: int,
    patches: int | None,
    warmup_steps: int,
    stages: Sequence[int] | None,
    kv_cache_dtype: str = "auto",
) -> None:
    """Raise `ParallelizeError` for settings that mean nothing."""
    for name, value in (("patches", 1 if patches is None else patches), ("warmup_steps", warmup_steps)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ParallelizeError(f"{name}={value!r} is not a positive integer; the nearest legal one is {name}=1")
    stored = None if stored_dtype(kv_cache_dtype) is None else kv_cache_dtype
    if pipefusion == 1 and (patches not in (None, 1) or stages is not None or stored is not None):
        given = {"patches": patches, "stages": stages, "kv_cache_dtype": stored}
        told = ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)
        raise ParallelizeError(f"{told} needs pipefusion > 1; nearest legal: leave it out")
