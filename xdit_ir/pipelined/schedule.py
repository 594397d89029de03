"""Which rank runs which stage for which patch when, and a proof that nobody waits for ever."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from xdit_ir.errors import VerifyError
from xdit_ir.ir.program import TensorSpec
from xdit_ir.pipefusion.pipeline_program import Pipeline

Message = tuple[TensorSpec, ...]
Plan = list[tuple[int, "StageRun"]]


@dataclass(frozen=True)
class StageRun:
    """One run of a stage, for a patch or (None: synchronous) for all patches; a rank goes by `issue_order`."""

    issue_order: int
    patch: int | None
    stage: int


def items_of(pipeline: Pipeline, number: int, stages: Sequence[int], *, synchronous: bool) -> list[StageRun]:
    """What a rank with these stages runs of the pass with this number."""
    patches: Sequence[int | None] = (None,) if synchronous else range(pipeline.patches)
    items = [
        StageRun(pipeline.issue_order(stage, number, patch or 0), patch, stage) for patch in patches for stage in stages
    ]
    return sorted(items, key=lambda item: item.issue_order)


def verify_schedule(pipeline: Pipeline) -> None:
    """Run passes of all ranks abstractly; raise `VerifyError` unless all of them end.

    A rank runs its items in order; receiving waits for the message that was sent as so-manieth between these stages,
    which must be of the types that are expected; the first stage waits for the outputs of the last pass.
    """
    for rank in range(pipeline.mesh.world_size):
        if pipeline.rank(0, pipeline.virtual_rank(rank, 0)) == rank:
            _verify_column(pipeline, tuple(pipeline.virtual_rank(rank, patch) for patch in range(pipeline.patches)))


def _verify_column(pipeline: Pipeline, virtual: tuple[int, ...]) -> None:
    """The ranks that pass patches to each other, by their virtual rank for each patch."""

    def message(stage: int, patch: int | None, *, sent: bool) -> Message:
        patches = range(pipeline.patches) if patch is None else (patch,)
        return tuple(spec for p in patches for spec in pipeline.part(stage, virtual[p]).message(sent=sent))

    run_plans(plans_of(pipeline), pipeline.stages, pipeline.patches, message)


def plans_of(pipeline: Pipeline, modes: Sequence[bool] = (True, False, False, True)) -> dict[int, Plan]:
    """What is run at each place along `pipefusion` in passes of these `modes` (whether synchronous), in order; before
    a synchronous pass, which wants all of the outputs before it, everything else is done."""
    plans: dict[int, Plan] = {}
    for place in sorted(set(pipeline.coordinates)):
        mine = [stage for stage, coordinate in enumerate(pipeline.coordinates) if coordinate == place]
        plans[place] = []
        pending: Plan = []
        for number, synchronous in enumerate(modes):
            if synchronous:
                plans[place] += _in_turn(pending)
                pending = []
            pending += [(number, item) for item in items_of(pipeline, number, mine, synchronous=synchronous)]
        plans[place] += _in_turn(pending)
    return plans


def _in_turn(plan: Plan) -> Plan:
    return sorted(plan, key=lambda entry: entry[1].issue_order)


def run_plans(plans: dict[int, Plan], stages: int, patches: int, message: Callable[..., Message]) -> None:
    """Run the items `(pass, item)` of every rank; `message(stage, patch, sent=...)` are the types that a stage sends
    or receives. Raises `VerifyError` where a message is not what is expected, or ranks wait for ever."""
    between: list[deque[Message]] = [deque() for _ in range(stages)]
    done: set[tuple[int, int | None]] = set()
    todo = {rank: deque(plan) for rank, plan in plans.items()}
    moved = True
    while moved:
        moved = False
        for rank, items in todo.items():
            while items and _may_run(items[0], patches, between, done):
                number, item = items.popleft()
                moved = True
                if item.stage:
                    got, want = between[item.stage].popleft(), message(item.stage, item.patch, sent=False)
                    if got != want:
                        raise VerifyError(
                            f"rank {rank}, stage {item.stage}, patch {item.patch}: expects {want}, but {got} is sent"
                        )
                if item.stage == stages - 1:
                    done.add((number, item.patch))
                else:
                    between[item.stage + 1].append(message(item.stage, item.patch, sent=True))
    if any(todo.values()) or any(between):
        stuck = ", ".join(f"rank {rank} before {items[0][1]}" for rank, items in todo.items() if items)
        raise VerifyError(f"stages wait for each other for ever: {stuck or 'messages are left over'}")


def _may_run(
    entry: tuple[int, StageRun], patches: int, between: Sequence[deque[Message]], done: set[tuple[int, int | None]]
) -> bool:
    number, item = entry
    if item.stage:
        return bool(between[item.stage])
    wanted = range(patches) if item.patch is None else (item.patch,)
    return number == 0 or (number - 1, None) in done or all((number - 1, patch) in done for patch in wanted)
