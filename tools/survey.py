"""Measure what the compiler makes of a model of the zoo, over several sets of degrees: data, no text."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

import xdit_ir as xir
from xdit_ir import models, passes
from xdit_ir.api import TracedProgram
from xdit_ir.capture.effects import copied
from xdit_ir.checking.check import check_parallel
from xdit_ir.degrees import Degrees, parse
from xdit_ir.errors import ParallelizeError, TraceError
from xdit_ir.ir.difference import relative_error, tensors_of
from xdit_ir.ir.draws import is_random
from xdit_ir.ir.graphs import all_graphs
from xdit_ir.ir.program import SPEC, Program, TensorSpec
from xdit_ir.sharding.fallbacks import find_gathers

DEGREES = tuple(parse("u2,u3,u4,r2,c2,u2r2"))
PART_DEGREES = tuple(parse("u2,u3,u4"))
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Outcome:
    """One set of degrees: why it was refused, or how exact (within `tolerance`) and how costly it is; `error` is
    unknown (nan) where the model draws noise.

    `slowest` and `work` are FLOPs of the slowest rank and of all ranks, over those of one device; `bytes` is what the
    busiest rank sends in a forward; `gathers` are all gathers in blocks, `fallbacks` the operators for which anything
    was gathered, anywhere, or that no rule divides, and `gathered` those of them for which something is sent.
    """

    degrees: str
    refused: str = ""
    error: float = 0.0
    tolerance: float = TOLERANCE
    slowest: float = 1.0
    work: float = 1.0
    bytes: int = 0
    gathers: tuple[str, ...] = ()
    gathered: tuple[str, ...] = ()
    fallbacks: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether every rank gave the model's output."""
        return not self.refused and self.error <= self.tolerance


@dataclass(frozen=True)
class Survey:
    """A model under all sets of degrees, or the reason why it could not be captured."""

    name: str
    not_captured: str = ""
    outcomes: tuple[Outcome, ...] = ()

    def outcome(self, degrees: str) -> Outcome:
        """The outcome for one set of degrees, by its short form."""
        return next(one for one in self.outcomes if one.degrees == degrees)

    def as_json(self) -> dict[str, Any]:
        """Plain data; `from_json` reads it."""
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Survey:
        """The survey that `as_json` wrote."""
        outcomes: list[dict[str, Any]] = data["outcomes"]
        places = [{key: tuple(one[key]) for key in ("gathers", "gathered", "fallbacks")} for one in outcomes]
        made = tuple(Outcome(**(one | found)) for one, found in zip(outcomes, places, strict=True))
        return Survey(data["name"], data["not_captured"], made)


@dataclass
class Subject:
    """A tiny model of the zoo, or a method of a decoder or encoder (`kl decode`), captured once, in float32.

    Where a model rounds to less inside, say to bfloat16, a sum in another order falls on the other side here and there,
    and the last bit of bfloat16 is far above the tolerance. Such a model is its own measure: it is off from itself in
    float64, or where its inputs change in the seventh digit, by some e, and so, up to chance, may a rank be; so the two
    may differ by a little more than 2 e.
    """

    name: str
    model: Callable[..., Any] = field(init=False)
    example: dict[str, Any] = field(init=False)
    traced: TracedProgram = field(init=False)
    tolerance: float = TOLERANCE

    def __post_init__(self) -> None:
        """Raises `TraceError` if the model cannot be captured."""
        name, _, call = self.name.partition(" ")
        self.model, self.example = models.load_part(name, call) if call else models.load(f"{name}:tiny")
        self.traced = xir.trace(self.model, self.example)
        if not call and _rounds(self.traced.ir):
            self.tolerance = max(TOLERANCE, 2.25 * self._rounding())

    def _rounding(self) -> float:
        """How far the model is from itself in float64, if it can run in that, and for inputs nearly the same."""
        wide, inputs = models.load(f"{self.name}:tiny", dtype=torch.float64)
        with torch.no_grad():
            narrow = tensors_of(self.model(**copied(self.example)))
            near = relative_error(tensors_of(self.model(**_nearly(copied(self.example)))), narrow)
            try:
                return max(near, relative_error(narrow, tensors_of(wide(**inputs))))
            except RuntimeError:
                return near

    def outcome(self, degrees: Degrees, *, run: bool = True) -> Outcome:
        """Divide, simulate every rank, compare with the model, and price; without `run` the error is unknown (nan)."""
        try:
            parallel = self.traced.parallelize(**degrees.as_dict())
        except ParallelizeError as refusal:
            return Outcome(str(degrees), refused=str(refusal))
        error = math.nan
        if run and not _draws(self.traced.ir):
            error = check_parallel(parallel, self.model, self.example, tolerance=self.tolerance).max_relative_error
        report = parallel.report()
        return Outcome(
            str(degrees),
            error=error,
            tolerance=self.tolerance,
            slowest=report.share,
            work=sum(report.flops_per_rank) / max(report.flops_total, 1),
            bytes=sum(entry.bytes_per_rank for entry in report.collectives),
            gathers=tuple(find_gathers(parallel.ir)),
            gathered=tuple(f"{item.op}, {item.place}: {item.reason}" for item in report.fallbacks if item.bytes),
            fallbacks=tuple(f"{item.op}, {item.place}: {item.reason}" for item in report.fallbacks),
        )


def _draws(program: Program) -> bool:
    """Whether it draws noise, each rank its own where all are simulated in one process."""
    return any(is_random(node.target) for _, graph, _ in all_graphs(program) for node in graph.nodes)


def _nearly(example: dict[str, Any]) -> dict[str, Any]:
    """Floats that differ in the seventh digit."""
    generator = torch.Generator().manual_seed(0)

    def nearly(x: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float32)
        return x * (1 + 1e-7 * noise).to(x.dtype) if x.dtype == torch.float32 else x

    return pytree.tree_map_only(torch.Tensor, nearly, example)  # type: ignore[no-any-return]


def _rounds(program: Program) -> bool:
    """Whether anything is computed in less than float32."""
    specs = [
        spec for _, graph, _ in all_graphs(program) for node in graph.nodes for spec in _specs(node.meta.get(SPEC))
    ]
    return any(spec.dtype in (torch.bfloat16, torch.float16) for spec in specs)


def _specs(spec: object) -> tuple[TensorSpec, ...]:
    """The types of a node's results."""
    if isinstance(spec, TensorSpec):
        return (spec,)
    return tuple(one for part in spec for one in _specs(part)) if isinstance(spec, tuple) else ()


def survey(name: str, degrees: Iterable[Degrees] = ()) -> Survey:
    """Everything about one model or part of the zoo, by default under `DEGREES` or `PART_DEGREES`; about ten seconds on
    one core."""
    degrees = tuple(degrees) or (PART_DEGREES if " " in name else DEGREES)
    try:
        subject = Subject(name)
    except TraceError as error:
        return Survey(name, not_captured=str(error))
    return Survey(name, outcomes=tuple(subject.outcome(one) for one in degrees))


def digest() -> str:
    """A fingerprint of the compiler and the zoo: results of other sources must not be mixed in."""
    state = hashlib.sha256()
    folders = [Path(folder) for package in (xir, passes, models) for folder in package.__path__]
    for path in (path for folder in folders for path in sorted(folder.rglob("*.py"))):
        state.update(path.name.encode() + path.read_bytes())
    return state.hexdigest()[:16]
