"""Which rank runs which stage for which patch when, and a proof that nobody waits for ever."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from xdit_ir.errors import VerifyError
from xdit_ir.patches import Pipeline
from xdit_ir.program import TensorSpec

Message = tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Item:
    """One run of a stage, for a patch or (None: synchronous) for all patches, in the `slot`-th unit of time."""

    slot: int
    patch: int | None
    stage: int

    @property
    def key(self) -> tuple[int, int]:
        """Items of a rank run in this order: in the same slot, what is nearer to the output goes first."""
        return self.slot, -self.stage


@dataclass(frozen=True)
class Schedule:
    """Passes of a pipeline of `stages` with `patches` follow each other at a distance of `slots`."""

    stages: int
    patches: int

    @property
    def slots(self) -> int:
        """Units of time from the start of one pass to that of the next: no stage is wanted twice, and the first patch
        has passed the last stage."""
        return max(self.patches, self.stages)

    def starts(self, modes: Sequence[bool]) -> list[int]:
        """The slots in which passes begin; a synchronous one (True) wants all of the outputs before it."""
        starts = [0]
        for synchronous in modes[1:]:
            starts.append(starts[-1] + (self.stages + self.patches if synchronous else self.slots))
        return starts

    def items(self, start: int, stages: Sequence[int], *, synchronous: bool) -> list[Item]:
        """What a rank with these stages runs of the pass that begins in slot `start`."""
        patches: Sequence[int | None] = (None,) if synchronous else range(self.patches)
        items = [Item(start + (patch or 0) + stage, patch, stage) for patch in patches for stage in stages]
        return sorted(items, key=lambda item: item.key)


def verify_schedule(pipeline: Pipeline, modes: Sequence[bool] = (True, False, False, True)) -> None:
    """Run passes (`modes`: whether synchronous) of all ranks abstractly; raise `VerifyError` unless all of them end.

    A rank runs its items in order; receiving waits for the message that was sent as so-manieth between these stages,
    which must be of the types that are expected; the first stage waits for the outputs of the last pass.
    """
    for column in _columns(pipeline):
        _verify_column(pipeline, column, modes)


def _columns(pipeline: Pipeline) -> Iterator[tuple[int, ...]]:
    """Per group of ranks that pass patches to each other: its virtual rank for each patch."""
    for rank in range(pipeline.mesh.world_size):
        if pipeline.rank(0, pipeline.virtual_rank(rank, 0)) == rank:
            yield tuple(pipeline.virtual_rank(rank, patch) for patch in range(pipeline.patches))


def _verify_column(pipeline: Pipeline, virtual: tuple[int, ...], modes: Sequence[bool]) -> None:
    schedule = Schedule(pipeline.stages, pipeline.patches)
    ranks = [pipeline.rank(stage, virtual[0]) for stage in range(pipeline.stages)]

    def message(stage: int, patch: int | None, *, sent: bool) -> Message:
        patches = range(pipeline.patches) if patch is None else (patch,)
        return tuple(spec for p in patches for spec in pipeline.part(stage, virtual[p]).message(sent=sent))

    plans: dict[int, list[tuple[int, Item]]] = {}
    for rank in sorted(set(ranks)):
        mine = [stage for stage, owner in enumerate(ranks) if owner == rank]
        items = [
            (number, item)
            for number, (start, synchronous) in enumerate(zip(schedule.starts(modes), modes, strict=True))
            for item in schedule.items(start, mine, synchronous=synchronous)
        ]
        plans[rank] = sorted(items, key=lambda entry: entry[1].key)
    run_plans(plans, pipeline.stages, pipeline.patches, message)


def run_plans(
    plans: dict[int, list[tuple[int, Item]]], stages: int, patches: int, message: Callable[..., Message]
) -> None:
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
    entry: tuple[int, Item], patches: int, between: Sequence[deque[Message]], done: set[tuple[int, int | None]]
) -> bool:
    number, item = entry
    if item.stage:
        return bool(between[item.stage])
    wanted = range(patches) if item.patch is None else (item.patch,)
    return number == 0 or (number - 1, None) in done or all((number - 1, patch) in done for patch in wanted)
