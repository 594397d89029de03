"""A plan: all ways to use some GPUs for a model, what each takes, and the best one as data."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from xdit_ir.capture.methods import Module, as_module
from xdit_ir.degrees import Degrees
from xdit_ir.errors import ParallelizeError
from xdit_ir.passes.keeping import Keeping
from xdit_ir.planning.estimate import Parts

HEADER = ("degrees", "ms", "products", "attention", "rest", "exchanges", "host", "GiB", "weights", "exact", "why not")
BEST = "best"


@dataclass(frozen=True)
class Candidate:
    """One way to use the GPUs: milliseconds of a step (under PipeFusion of a displaced one) and their parts, GiB and
    GiB of weights of each rank; whether results are those of one GPU. `why` it is not the best; empty for that.

    Parts are there where the divided program was worked out; of the others, `ms` follows from that of one GPU. Neither
    is there where it is illegal.
    """

    degrees: Degrees
    why: str
    ms: float | None = None
    parts: Parts | None = None
    gib: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether all ranks compute what one would."""
        return self.degrees.mesh.degrees["pipefusion"] == 1

    @property
    def legal(self) -> bool:
        """Whether the model can be divided so, as far as is known."""
        return self.ms is not None

    def row(self) -> tuple[str, ...]:
        """As text, in the order of `HEADER`."""
        parts = self.parts
        times = ("",) * 5 if parts is None else tuple(f"{value:.1f}" for value in dataclasses.astuple(parts))
        ms = "" if self.ms is None else f"{self.ms:.1f}" if parts else f"~{self.ms:.0f}"
        sizes = (f"{max(each):.1f}" if each else "" for each in (self.gib, self.weights))
        return (str(self.degrees), ms, *times, *sizes, "yes" if self.exact else "no", self.why or BEST)


@dataclass(frozen=True)
class Plan:
    """For a `model` (its class, and a digest of its weights' names and shapes) on `gpus` GPUs of a `machine`, by name;
    candidates begin with the best. `memory`: GiB that a rank may use. `shard_weights`, `stream_weights`: as for
    `parallelize`."""

    model: str
    weights: str
    gpus: int
    machine: str
    memory: float
    candidates: tuple[Candidate, ...]
    shard_weights: bool = False
    stream_weights: bool = False

    @property
    def chosen(self) -> Candidate:
        """The best candidate.

        Raises:
            ParallelizeError: none fits; says which needs the least.
        """
        first = self.candidates[0]
        if not first.why:
            return first
        least = min((one for one in self.candidates if one.gib), key=lambda one: max(one.gib), default=None)
        near = f"{least.degrees} needs the least, {max(least.gib):.1f} GiB a GPU" if least else first.why
        raise ParallelizeError(
            f"no way to use {self.gpus} GPUs with {self.memory:.1f} GiB each for {self.model}: {near}; use more GPUs, "
            "shard_weights=True, stream_weights=True, or exact=False"
        )

    @property
    def best(self) -> dict[str, Any]:
        """Keyword arguments for `port` and `parallelize`."""
        return {**self.chosen.degrees.as_dict(), **Keeping(self.shard_weights, self.stream_weights).options}

    def check(self, model: Module, processes: int | None) -> None:
        """Raise `ParallelizeError` if this was made for another model, or the job has another number of processes."""
        if (key := weights_key(model)) != self.weights:
            raise ParallelizeError(
                f"plan= was made for a {self.model} with weights {self.weights}, but this is a {model_name(model)} "
                f"with weights {key}: make one with xdit_ir.plan for this model"
            )
        if processes is not None and processes != self.gpus:
            raise ParallelizeError(
                f"plan= is for {self.gpus} processes, this job has {processes}: start {self.gpus}, or make a plan for "
                f"gpus={processes}"
            )

    def __str__(self) -> str:
        """A table."""
        stream = io.StringIO()
        table = Table(title=f"{self.model} on {self.gpus} x {self.machine}, {self.memory:.1f} GiB each; ms a step")
        for name in HEADER:
            table.add_column(name, justify="left" if name in (HEADER[0], HEADER[-1]) else "right")
        for one in self.candidates:
            if one.legal:
                table.add_row(*one.row())
        for why, refused in self._refused().items():
            table.add_row(", ".join(map(str, refused)), *[""] * (len(HEADER) - 2), why)
        Console(file=stream, width=150, color_system=None).print(table)
        return stream.getvalue()

    def _refused(self) -> dict[str, list[Degrees]]:
        """What is illegal, by reason."""
        found: dict[str, list[Degrees]] = {}
        for one in self.candidates:
            if not one.legal:
                found.setdefault(one.why, []).append(one.degrees)
        return found

    def to_json(self) -> str:
        """All of it as text, for `from_json`."""
        rows = [dataclasses.asdict(one) | {"degrees": one.degrees.as_dict()} for one in self.candidates]
        return json.dumps(dataclasses.asdict(self) | {"candidates": rows}, indent=1)

    @staticmethod
    def from_json(text: str) -> Plan:
        """What `to_json` wrote.

        Raises:
            ParallelizeError: it is no plan.
        """
        try:
            data = json.loads(text)
            return Plan(**{**data, "candidates": tuple(map(_candidate, data["candidates"]))})
        except (ValueError, TypeError, LookupError) as error:
            raise ParallelizeError(f"this is no plan as Plan.to_json writes it: {error}") from None


def _candidate(data: Mapping[str, Any]) -> Candidate:
    parts = None if data["parts"] is None else Parts(**data["parts"])
    sizes = {name: tuple(data[name]) for name in ("gib", "weights")}
    return Candidate(**{**data, **sizes, "degrees": Degrees.of(**data["degrees"]), "parts": parts})


def model_name(model: Module) -> str:
    """What people call it."""
    return type(as_module(model)).__name__


def weights_key(model: Module) -> str:
    """A digest of the names and shapes of a model's parameters and buffers."""
    module: nn.Module = as_module(model)
    named = [(name, tuple(x.shape)) for name, x in (*module.named_parameters(), *module.named_buffers())]
    return hashlib.blake2b(repr(sorted(named)).encode(), digest_size=6).hexdigest()
