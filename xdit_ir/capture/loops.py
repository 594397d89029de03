"""Loops and branches as higher-order operators, written out: `scan`, `map`, `while_loop`, `cond`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from xdit_ir.capture.recorder import Recorder
from xdit_ir.capture.source import source_line

STEPS = 1024  # that are written out at most
Body = Callable[..., Any]


def _scan(recorder: Recorder, body: Body, init: Sequence[Any], xs: Sequence[torch.Tensor], more: Sequence[Any]) -> Any:
    carry, made = list(init), []
    for step in range(_counted(recorder, xs[0].shape[0])):
        results = body(*carry, *(x[step] for x in xs), *more)
        carry, outs = list(results[: len(carry)]), results[len(carry) :]
        made.append(outs)
    stacked = [None if column[0] is None else torch.stack(column) for column in zip(*made, strict=True)]
    return (*carry, *stacked)


def _associative(recorder: Recorder, body: Body, xs: Sequence[torch.Tensor], more: Sequence[Any]) -> Any:
    made = [tuple(x[0] for x in xs)]
    for step in range(1, _counted(recorder, xs[0].shape[0])):
        made.append(tuple(body(*made[-1], *(x[step] for x in xs), *more)))
    return tuple(torch.stack(column) for column in zip(*made, strict=True))


def _map(recorder: Recorder, body: Body, xs: Sequence[torch.Tensor], more: Sequence[Any]) -> Any:
    made = [body(*(x[step] for x in xs), *more) for step in range(_counted(recorder, xs[0].shape[0]))]
    spec = pytree.tree_structure(made[0])
    columns = zip(*(pytree.tree_leaves(one) for one in made), strict=True)
    return pytree.tree_unflatten([torch.stack(column) for column in columns], spec)


def _while(
    recorder: Recorder, condition: Body, body: Body, carried: Sequence[Any], more: Sequence[Any], **_: Any
) -> Any:
    state, steps = tuple(carried), 0
    while bool(condition(*state, *more)):
        state, steps = tuple(body(*state, *more)), _counted(recorder, steps + 1)
    return state


def _branch(recorder: Recorder, condition: Any, yes: Body, no: Body, operands: Sequence[Any]) -> Any:
    """The side that is known to be taken, else both, of which one is selected."""
    if not isinstance(condition, torch.Tensor) or recorder.value(condition).known is not None:
        return yes(*operands) if condition else no(*operands)
    return pytree.tree_map(lambda a, b: torch.where(condition, a, b), yes(*operands), no(*operands))


def _counted(recorder: Recorder, steps: int) -> int:
    if steps > STEPS:
        raise recorder.opaque(f"{source_line()}: a loop of more than {STEPS} steps")
    return steps


_WRITTEN: dict[str, Callable[..., Any]] = {
    "scan": _scan, "associative_scan": _associative, "map_impl": _map, "while_loop": _while, "cond": _branch,
}  # fmt: skip


def written_out(operator: Any) -> Callable[..., Any] | None:
    """How a higher-order operator is written out by others; None if it cannot be."""
    return _WRITTEN.get(str(operator.name()))
