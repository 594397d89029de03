"""Every rank of a parallel program in this thread, in lockstep and deterministic: no processes, no GPU, no ports."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from xdit_ir.errors import ExecutionError, VerifyError
from xdit_ir.ir.collective_ops import (
    Communicate,
    Reduce,
    ReduceScatter,
    Reshuffle,
    Ring,
    Together,
    add_up,
    pack,
    unpack,
)
from xdit_ir.ir.interpret import GraphRun, Interpreter, State, Steps
from xdit_ir.ir.named_tensors import constants_on
from xdit_ir.ir.program import CONSTANT, Program
from xdit_ir.ir.relayout import RankExchange
from xdit_ir.kernels.attention import RingMerge

# Sees the rank, the name of the block call (empty: outer graph), a node of its body, and the value.
RankObserver = Callable[[int, str, fx.Node, Any], None]

_FAILURES = (RuntimeError, IndexError, TypeError, ValueError)  # what PyTorch raises for operands that do not fit


@dataclass(frozen=True)
class _Meeting:
    """A rank waits at a communication with these operands."""

    target: Communicate
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    node: fx.Node


@dataclass(frozen=True)
class Waiting:
    """A rank waits until `ready` says that it may go on."""

    ready: Callable[[], bool]
    node: fx.Node
    kind: str = "read"


class RankInterpreter(Interpreter):
    """Runs one rank's program as a generator that stops wherever it must meet the others."""

    def __init__(
        self, rank: int, program: Program, state: State, device: torch.device, observe: RankObserver | None
    ) -> None:
        own = constants_on(program, (f"{CONSTANT}.{name}" for name in program.constants), device)

        def held(name: str) -> torch.Tensor:
            return own[name] if name in own else state(name)

        super().__init__(program, held, device, None if observe is None else functools.partial(observe, rank))
        self.rank = rank

    def node(self, node: fx.Node, frame: GraphRun) -> Steps:
        """The value of one node; what fails says where."""
        try:
            return (yield from super().node(node, frame))
        except _FAILURES as error:
            raise ExecutionError(self.rank, frame.site, node.name, str(error)) from error

    def operator(self, node: fx.Node, args: Any, kwargs: dict[str, Any], prefix: str) -> Steps:
        """The result of an operator, or what the others give."""
        if isinstance(node.target, Communicate):
            return (yield _Meeting(node.target, args, kwargs, node))
        return (yield from super().operator(node, args, kwargs, prefix))


def run_ranks(
    programs: Sequence[Program],
    state: State,
    inputs: Sequence[torch.Tensor],
    device: torch.device,
    observe: RankObserver | None = None,
) -> list[tuple[torch.Tensor, ...]]:
    """Outputs of every rank for the same inputs; `observe` sees every value."""
    return run_each(programs, state, [inputs for _ in programs], device, observe)


def run_each(
    programs: Sequence[Program],
    state: State,
    given: Sequence[Sequence[torch.Tensor]],
    device: torch.device,
    observe: RankObserver | None = None,
) -> list[tuple[torch.Tensor, ...]]:
    """The same where every rank is given its own."""
    steps = {
        rank: RankInterpreter(rank, program, state, device, observe).graph(program.graph, given[rank])
        for rank, program in enumerate(programs)
    }
    results = lockstep(steps)
    return [results[rank] for rank in range(len(programs))]


def lockstep(steps: Mapping[int, Steps]) -> dict[int, Any]:
    """Run the ranks until each has returned; whoever meets others waits for them."""
    results: dict[int, Any] = {}
    waiting: dict[int, _Meeting | Waiting] = {}
    ready: list[tuple[int, Any]] = [(rank, None) for rank in steps]
    while ready:
        for rank, answer in ready:
            try:
                waiting[rank] = steps[rank].send(answer)
            except StopIteration as stop:
                results[rank] = stop.value
        ready = []
        for rank in sorted(waiting):
            at = waiting.get(rank)
            if isinstance(at, Waiting) and at.ready():
                del waiting[rank]
                ready.append((rank, None))
            elif isinstance(at, _Meeting) and rank == at.target.group[0]:
                try:
                    ready += _met(at.target.group, waiting)
                except _FAILURES as error:
                    steps[rank].throw(error)  # where it stands it knows its place in the program
    if waiting:
        raise VerifyError("ranks wait for each other for ever: " + _describe(waiting))
    return results


def _met(group: tuple[int, ...], waiting: dict[int, _Meeting | Waiting]) -> list[tuple[int, Any]]:
    """The answers for a group, if all its members are there."""
    meetings = [at for member in group if isinstance(at := waiting.get(member), _Meeting)]
    if len(meetings) < len(group):
        return []
    first = meetings[0]
    if any(at.target.group != group or at.node.name != first.node.name for at in meetings):
        raise VerifyError("ranks meet at different collectives: " + _describe({m: waiting[m] for m in group}))
    for member in group:
        del waiting[member]
    return list(zip(group, _meet(group, meetings), strict=True))


def _describe(waiting: Mapping[int, _Meeting | Waiting]) -> str:
    kinds = {rank: at.kind if isinstance(at, Waiting) else at.target.kind for rank, at in waiting.items()}
    return ", ".join(f"rank {rank} at {kinds[rank]} {at.node.name}" for rank, at in sorted(waiting.items()))


def _meet(group: tuple[int, ...], meetings: Sequence[_Meeting]) -> list[Any]:
    target = meetings[0].target
    if isinstance(target, Reduce):
        return [add_up([meeting.args[0] for meeting in meetings])] * len(group)
    if isinstance(target, ReduceScatter):
        plans = [meeting.target.exchange for meeting in meetings if isinstance(meeting.target, ReduceScatter)]
        summands = [pack(m.args[0], exchange) for m, exchange in zip(meetings, plans, strict=True)]
        return [add_up([pieces[i] for pieces in summands]) for i in range(len(group))]
    if isinstance(target, Reshuffle):
        exchanges = [meeting.target.exchange for meeting in meetings if isinstance(meeting.target, Reshuffle)]
        return _exchanged([meeting.args[0] for meeting in meetings], exchanges)
    if isinstance(target, Together):
        all_of = [meeting.target.exchanges for meeting in meetings if isinstance(meeting.target, Together)]
        values = zip(*(meeting.args for meeting in meetings), strict=True)
        found = [_exchanged(each, plans) for each, plans in zip(values, zip(*all_of, strict=True), strict=True)]
        return list(zip(*found, strict=True))
    assert isinstance(target, Ring)
    return [_ring(at, meetings, target) for at in range(len(group))]


def _exchanged(values: Sequence[torch.Tensor], exchanges: Sequence[RankExchange]) -> list[torch.Tensor]:
    """What each member of a group has after an exchange of their values."""
    sent = [pack(value, exchange) for value, exchange in zip(values, exchanges, strict=True)]
    return [unpack([pieces[i] for pieces in sent], exchange) for i, exchange in enumerate(exchanges)]


def _ring(at: int, meetings: Sequence[_Meeting], target: Ring) -> torch.Tensor:
    """Visit the ring's members in the order in which their keys arrive at member `at`."""
    merge = ring_merge(target, meetings[at].args, meetings[at].kwargs)
    for hop in range(len(meetings)):
        member = (at - hop) % len(meetings)
        merge.add(member, *meetings[member].args[1:3])
    return merge.result()


def ring_merge(target: Ring, args: Sequence[Any], kwargs: Mapping[str, Any]) -> RingMerge:
    """The accumulator for one rank's call of ring attention."""
    mask = kwargs.get("mask", args[3] if len(args) > 3 else None)
    return RingMerge(args[0], mask, kwargs.get("scale"), target.keys, enable_gqa=bool(kwargs.get("enable_gqa", False)))
