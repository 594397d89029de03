"""What was measured, beside what a plan works out for it: files of `xdit-ir bench`, machine by machine."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.api import ParallelProgram, TracedProgram
from xdit_ir.degrees import parse
from xdit_ir.planning.estimate import Estimate, estimate
from xdit_ir.planning.hardware import Hardware, load
from xdit_ir.tools.contenders import Contender

# What is compared is compiled; one operator at a time is not what is worked out.
WORKED_OUT = ("compiled", "graph", "collective")
# Differences that are no order.
ALIKE = 1.1
# How much longer than the best one what a plan takes may be.
CHOICE = 1.03
# Seconds in which a CUDA graph of several streams starts a kernel or a copy; where calls are not waited for one by one,
# the one before hides that. FLUX.1-dev u2: 80.5 ms waited for, 75 ms not, 2005 of them.
LAUNCH = 2.7e-6
# Of an exchange: a copy to a peer, one that stays, a signal that is sent and one that is awaited.
STARTED = 4


@dataclass(frozen=True)
class Measured:
    """One contender of a file: median milliseconds of a step, or, where no more is known, how many times those of the
    contender `of`; GiB at the most, if known; `flash`: by FlashAttention; `waited`: every call was waited for before
    the next one; `stream`: weights lie with the host, but for so many."""

    machine: str
    model: str
    contender: Contender
    flash: bool
    ms: float
    gib: float | None = None
    file: str = ""
    waited: bool = False
    stream: bool | str = False
    of: Contender | None = None

    def __str__(self) -> str:
        marks = (
            " waited" * self.waited,
            f" stream={self.stream}" * bool(self.stream),
            f" of {self.of}" * bool(self.of),
        )
        return f"{self.machine} {self.model} {self.contender}{''.join(marks)}"

    @property
    def group(self) -> tuple[Any, ...]:
        """Times of one group may be compared."""
        return self.machine, self.model, self.waited, self.stream, self.of

    @property
    def way(self) -> tuple[str, str, bool | str]:
        """What was run."""
        return self.model, self.contender.degrees + "+sharded" * self.contender.sharded, self.stream


@dataclass(frozen=True)
class Compared:
    """A measurement, what was worked out for it, and in the same unit as what was measured."""

    measured: Measured
    found: Estimate
    ms: float

    @property
    def ratio(self) -> float:
        """Worked out to measured."""
        return self.ms / self.measured.ms


def read(path: Path, *, plain: bool = False) -> Iterator[Measured]:
    """What can be worked out of a file of `xdit-ir bench`, or of several in one; `plain`: measured without
    FlashAttention. Where contenders have no graph, the host bounds them, which is known of H100s only."""
    data = json.loads(path.read_text("utf-8"))
    for document in data.get("documents", [data]):
        machine = "h200" if "H200" in document["gpu"] else "h100"
        for result in document["results"]:
            contender = Contender.parse(result["contender"])
            bound = contender.mode == "compiled" and contender.degrees != "alone" and machine != "h100"
            known = "median_ms" in result or "times" in result
            if contender.library or contender.mode not in WORKED_OUT or bound or not known:
                continue
            without = plain or document.get("plain", False)
            flash = not without and contender.degrees != "alone" and contender.attention != "sdpa"
            yield Measured(
                *(machine, document["model"], contender, flash, result.get("median_ms") or result["times"]),
                gib=result.get("memory_gib"),
                file=path.stem,
                waited=document.get("waited", False),
                stream=result.get("stream", False),
                of=Contender.parse(result["of"]) if "of" in result else None,
            )


def worked_out(one: Measured, hardware: Hardware | None = None) -> Compared:
    """The same, from sizes; `hardware`: what the machine was measured as, else the one that is kept."""
    found, taken = _worked_out(one, hardware)
    if one.of is None:
        return Compared(one, found, taken)
    base = dataclasses.replace(one, contender=one.of, flash=one.flash and one.of.degrees != "alone")
    return Compared(one, found, taken / _worked_out(base, hardware)[1])


@lru_cache
def _worked_out(one: Measured, hardware: Hardware | None) -> tuple[Estimate, float]:
    """And milliseconds of a call: where ranks run calls of their own, of as many of them."""
    known = load(one.machine) if hardware is None else hardware
    recorded, parallel = one.contender.mode != "compiled", _parallel(*_way(one))
    used = _by_collectives(known) if one.contender.mode == "collective" else known
    found = estimate(parallel, used, flash=one.flash, recorded=recorded)
    started = found.kernels + STARTED * found.exchanges if one.waited and recorded and found.exchanges else 0
    return found, (found.ms + LAUNCH * 1e3 * started) / parallel.forwards


def _way(one: Measured) -> tuple[str, str, bool, bool | str]:
    degrees = "u1" if one.contender.degrees == "alone" else one.contender.degrees
    return one.model, degrees, one.contender.sharded, one.stream


def compare(measured: Iterable[Measured], hardware: Hardware | None = None) -> list[Compared]:
    """Each with what is worked out, model by model, as each of them is traced."""
    return [worked_out(one, hardware) for one in sorted(measured, key=lambda one: one.model)]


def disorder(compared: Sequence[Compared]) -> list[tuple[Compared, Compared]]:
    """Pairs of a group whose times differ, and of which the wrong one is said to be faster."""
    return [
        (first, second)
        for group in _groups(compared).values()
        for first, second in itertools.combinations(group, 2)
        if not 1 / ALIKE <= first.measured.ms / second.measured.ms <= ALIKE
        and (first.measured.ms < second.measured.ms) != (first.ms < second.ms)
    ]


def choices(compared: Sequence[Compared]) -> dict[tuple[Any, ...], float]:
    """Of each group, how much longer than the fastest that takes which is said to be the fastest."""
    return {
        key: min(group, key=lambda one: one.ms).measured.ms / min(one.measured.ms for one in group)
        for key, group in _groups(compared).items()
    }


def lines(compared: Sequence[Compared]) -> Iterator[str]:
    """As text: every figure, then what does not hold of the bars."""
    for one in compared:
        what, unit = one.measured, 1 if one.measured.of is None else 100
        gib = "" if what.gib is None else f"   {what.gib:5.1f} and {max(one.found.gib):5.1f} GiB"
        yield (f"{what!s:62s} {unit * what.ms:8.1f} measured {unit * one.ms:8.1f} worked out {one.ratio:5.2f}{gib}")
    near = [sum(abs(one.ratio - 1) <= bound for one in compared) for bound in (0.1, 0.15)]
    names = {one.measured.model for one in compared}
    ways = {one.measured.way for one in compared}
    yield f"{len(compared)}, {len(ways)} ways of {len(names)} models: {near[0]} within 10 %, {near[1]} within 15 %"
    for first, second in disorder(compared):
        yield f"wrong order: {first.measured} and {second.measured}"
    for (machine, model, *_), times in choices(compared).items():
        yield f"{machine} {model}: what is said to be the fastest takes {times:.3f} of the fastest"


def _groups(compared: Iterable[Compared]) -> Mapping[tuple[Any, ...], list[Compared]]:
    found = defaultdict[tuple[Any, ...], list[Compared]](list)
    for one in compared:
        found[one.measured.group].append(one)
    return found


@lru_cache(maxsize=1)
def _traced(model: str) -> TracedProgram:
    """Not verified after every pass: nothing is run."""
    return TracedProgram(xir.trace(*models.load(model, device="meta", dtype=torch.bfloat16)).ir, familiar=True)


@lru_cache(maxsize=16)
def _parallel(model: str, degrees: str, sharded: bool, stream: bool | str) -> ParallelProgram:
    """Divided as a port would: a batch that cannot be, by calls."""
    weights = {"shard_weights": True} if sharded else {"stream_weights": stream} if stream else {}
    options: dict[str, Any] = {**parse(degrees)[0].as_dict(), **weights}
    try:
        return _traced(model).parallelize(**options)
    except xir.ParallelizeError:
        return _traced(model).parallelize(**options, pair_calls=True)


def _by_collectives(hardware: Hardware) -> Hardware:
    """NCCL's kernels take the place of others, and begin later."""
    links = (dataclasses.replace(link, hidden=False, latency=30e-6) for link in hardware.links)
    return dataclasses.replace(hardware, links=tuple(links))
