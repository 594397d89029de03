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


@dataclass(frozen=True)
class Measured:
    """One contender of a file: median milliseconds of a step, and GiB at the most; `flash`: by FlashAttention."""

    machine: str
    model: str
    contender: Contender
    flash: bool
    ms: float
    gib: float
    file: str = ""

    @property
    def group(self) -> tuple[str, str]:
        """Times of one group may be compared."""
        return self.machine, self.model


@dataclass(frozen=True)
class Compared:
    """A measurement and what was worked out for it."""

    measured: Measured
    found: Estimate

    @property
    def ratio(self) -> float:
        """Worked out to measured."""
        return self.found.ms / self.measured.ms


def read(path: Path, *, plain: bool = False) -> Iterator[Measured]:
    """What can be worked out of a file of `xdit-ir bench`, or of several in one; `plain`: measured without
    FlashAttention. Where contenders have no graph, the host bounds them, which is known of H100s only."""
    data = json.loads(path.read_text("utf-8"))
    for document in data.get("documents", [data]):
        machine = "h200" if "H200" in document["gpu"] else "h100"
        for result in document["results"]:
            contender = Contender.parse(result["contender"])
            bound = contender.mode == "compiled" and contender.degrees != "alone" and machine != "h100"
            if contender.library or contender.mode not in WORKED_OUT or bound or "median_ms" not in result:
                continue
            flash = not plain and contender.degrees != "alone" and contender.attention != "sdpa"
            yield Measured(
                machine, document["model"], contender, flash, result["median_ms"], result["memory_gib"], path.stem
            )


def worked_out(one: Measured, hardware: Hardware | None = None) -> Estimate:
    """The same, from sizes; `hardware`: what the machine was measured as, else the one that is kept."""
    known = load(one.machine) if hardware is None else hardware
    mode, degrees = one.contender.mode, "u1" if one.contender.degrees == "alone" else one.contender.degrees
    made = _parallel(one.model, degrees, sharded=one.contender.sharded)
    return estimate(
        made, _by_collectives(known) if mode == "collective" else known, flash=one.flash, recorded=mode != "compiled"
    )


def compare(measured: Iterable[Measured], hardware: Hardware | None = None) -> list[Compared]:
    """Each with what is worked out, model by model, as each of them is traced."""
    return [Compared(one, worked_out(one, hardware)) for one in sorted(measured, key=lambda one: one.model)]


def disorder(compared: Sequence[Compared]) -> list[tuple[Compared, Compared]]:
    """Pairs of a group whose times differ, and of which the wrong one is said to be faster."""
    return [
        (first, second)
        for group in _groups(compared).values()
        for first, second in itertools.combinations(group, 2)
        if not 1 / ALIKE <= first.measured.ms / second.measured.ms <= ALIKE
        and (first.measured.ms < second.measured.ms) != (first.found.ms < second.found.ms)
    ]


def choices(compared: Sequence[Compared]) -> dict[tuple[str, str], float]:
    """Of each group, how much longer than the fastest that takes which is said to be the fastest."""
    return {
        key: min(group, key=lambda one: one.found.ms).measured.ms / min(one.measured.ms for one in group)
        for key, group in _groups(compared).items()
    }


def lines(compared: Sequence[Compared]) -> Iterator[str]:
    """As text: every figure, then what does not hold of the bars."""
    for one in compared:
        what = one.measured
        yield (
            f"{what.machine} {what.model:22s} {what.contender!s:28s} {what.ms:8.1f} measured {one.found.ms:8.1f} "
            f"worked out {one.ratio:5.2f}   {what.gib:5.1f} and {max(one.found.gib):5.1f} GiB"
        )
    near = [sum(abs(one.ratio - 1) <= bound for one in compared) for bound in (0.1, 0.15)]
    names = {one.measured.model for one in compared}
    yield f"{len(compared)} of {len(names)} models: {near[0]} within 10 %, {near[1]} within 15 %"
    for first, second in disorder(compared):
        yield f"wrong order: {first.measured.model} {first.measured.contender} and {second.measured.contender}"
    for (machine, model), times in choices(compared).items():
        yield f"{machine} {model}: what is said to be the fastest takes {times:.3f} of the fastest"


def _groups(compared: Iterable[Compared]) -> Mapping[tuple[str, str], list[Compared]]:
    found = defaultdict[tuple[str, str], list[Compared]](list)
    for one in compared:
        found[one.measured.group].append(one)
    return found


@lru_cache(maxsize=1)
def _traced(model: str) -> TracedProgram:
    """Not verified after every pass: nothing is run."""
    return TracedProgram(xir.trace(*models.load(model, device="meta", dtype=torch.bfloat16)).ir, familiar=True)


@lru_cache(maxsize=8)
def _parallel(model: str, degrees: str, *, sharded: bool) -> ParallelProgram:
    options: dict[str, Any] = {"shard_weights": True} if sharded else {}
    return _traced(model).parallelize(**parse(degrees)[0].as_dict(), **options)


def _by_collectives(hardware: Hardware) -> Hardware:
    """NCCL's kernels take the place of others, and begin later."""
    links = (dataclasses.replace(link, hidden=False, latency=30e-6) for link in hardware.links)
    return dataclasses.replace(hardware, links=tuple(links))
