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

from xdit_ir.degrees import Degrees
from xdit_ir.errors import ParallelizeError
from xdit_ir.passes.keeping import Keeping
from xdit_ir.planning.estimate import Breakdown
from xdit_ir.reflection.methods import Module, as_module
from xdit_ir.sharding.machine import Machine

PARTS = tuple(field.name for field in dataclasses.fields(Breakdown))
HEADER = ("degrees", "ms", "a second", *PARTS, "GiB", "weights", "exact", "between nodes", "why not")
TEXT = ("degrees", "between nodes", "why not")
BEST = "best"
# It exchanges what whole weights do, and more, so that no time can be less: it need not be worked out.
WHOLE = "whole weights fit, and gathering parts takes no less"


@dataclass(frozen=True)
class Candidate:
    """One way to use the GPUs: as `data` replicas of `degrees`, with weights in parts if `shard_weights`, or with the
    host (`stream_weights`: True, or bytes that stay on the GPU); milliseconds of a step (under PipeFusion of a
    displaced one) and their parts, GiB and GiB of weights of each rank of a replica; the mesh dims `between` nodes.
    `why` it is not the best; empty for that.

    `parts` are there where the divided program was worked out; of the others, `ms` follows from that of one GPU.
    Neither is there where it is illegal.
    """

    degrees: Degrees
    why: str
    ms: float | None = None
    parts: Breakdown | None = None
    gib: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()
    data: int = 1
    shard_weights: bool = False
    between: tuple[str, ...] = ()
    stream_weights: bool | int = False

    @property
    def name(self) -> str:
        """In short, such as `u8`, `u8 sharded`, `u1 streamed but 20.0 GiB` and `2 x u4`."""
        degrees = f"{self.degrees} sharded" if self.shard_weights else str(self.degrees)
        if self.stream_weights:
            stays = self.keeping.resident
            degrees = f"{degrees} streamed but {stays / 2**30:.1f} GiB" if stays else f"{degrees} streamed"
        return degrees if self.data == 1 else f"{self.data} x {degrees}"

    @property
    def keeping(self) -> Keeping:
        """Where weights are."""
        return Keeping.of(self.shard_weights, self.stream_weights)

    @property
    def exact(self) -> bool:
        """Whether all ranks compute what one would."""
        return self.degrees.mesh.degrees["pipefusion"] == 1

    @property
    def legal(self) -> bool:
        """Whether the model can be divided so, as far as is known."""
        return self.ms is not None

    @property
    def a_second(self) -> float:
        """Steps that all replicas make together."""
        return self.data * 1e3 / self.ms if self.ms else 0.0

    def row(self) -> tuple[str, ...]:
        """As text, in the order of `HEADER`."""
        parts, rough = self.parts, "" if self.parts else "~"
        times = ("",) * len(PARTS) if parts is None else tuple(f"{value:.1f}" for value in dataclasses.astuple(parts))
        ms = "" if self.ms is None else f"{self.ms:.1f}" if parts else f"~{self.ms:.0f}"
        rate = f"{rough}{self.a_second:.{0 if self.a_second >= 10 else 1}f}" if self.ms else ""
        sizes = (f"{max(each):.1f}" if each else "" for each in (self.gib, self.weights))
        exact, between = "yes" if self.exact else "no", ", ".join(self.between)
        return (self.name, ms, rate, *times, *sizes, exact, between, self.why or BEST)


@dataclass(frozen=True)
class Plan:
    """For a `model` (its class, and a digest of its weights' names and shapes) on `gpus` GPUs of a `machine`, by name;
    candidates begin with the best. `memory`: GiB that a rank may use. `speeds`: those by which passes choose.
    `kv_cache_dtype`: of what patches leave for each other, in the ways that have stages."""

    model: str
    weights: str
    gpus: int
    machine: str
    memory: float
    candidates: tuple[Candidate, ...]
    speeds: Machine
    kv_cache_dtype: str = "auto"

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
        near = f"{least.name} needs the least, {max(least.gib):.1f} GiB a GPU" if least else first.why
        raise ParallelizeError(
            f"no way to use {self.gpus} GPUs with {self.memory:.1f} GiB each for {self.model}: {near}; use more GPUs, "
            "shard_weights=True, stream_weights=True, or exact=False"
        )

    @property
    def best(self) -> dict[str, Any]:
        """Keyword arguments for `port`; without replicas also for `parallelize`."""
        chosen = self.chosen
        return {
            **chosen.degrees.as_dict(),
            **chosen.keeping.options,
            **({"data": chosen.data} if chosen.data > 1 else {}),
            **({} if chosen.exact or self.kv_cache_dtype == "auto" else {"kv_cache_dtype": self.kv_cache_dtype}),
        }

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
        shown = [place for place, name in enumerate(HEADER) if name != "between nodes" or self._spans_nodes]
        for place in shown:
            name = HEADER[place]
            table.add_column(name, justify="left" if name in TEXT else "right")
        for cells in self._rows():
            table.add_row(*(cells[place] for place in shown))
        Console(file=stream, width=160, color_system=None).print(table)
        return stream.getvalue()

    @property
    def _spans_nodes(self) -> bool:
        return any(one.between for one in self.candidates)

    def _rows(self) -> list[tuple[str, ...]]:
        """In order; what was not worked out for the same reason is one row."""
        alike: dict[str, list[Candidate]] = {}
        for one in self.candidates:
            alike.setdefault(one.name if one.legal and one.why != WHOLE else one.why, []).append(one)
        blank = ("",) * (len(HEADER) - 2)
        return [
            one.row() if not more else (", ".join(each.name for each in (one, *more)), *blank, one.why)
            for one, *more in alike.values()
        ]

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
            candidates, speeds = tuple(map(_candidate, data["candidates"])), Machine.of(data["speeds"])
            return Plan(**{**data, "candidates": candidates, "speeds": speeds})
        except (ValueError, TypeError, LookupError) as error:
            raise ParallelizeError(f"this is no plan as Plan.to_json writes it: {error}") from None


def slower(one: Candidate, best: Candidate, times: float) -> str:
    """Why a candidate is behind the best, by the part that it loses most in."""
    if one.parts is None or best.parts is None:
        return f"about {times:.2f} times as long by sizes alone"
    ours, theirs = dataclasses.astuple(one.parts), dataclasses.astuple(best.parts)
    lost, name = max((a - b, name) for a, b, name in zip(ours, theirs, PARTS, strict=True))
    return f"{times:.2f} times as long; {name} {lost:+.1f} ms"


def _candidate(data: Mapping[str, Any]) -> Candidate:
    parts = None if data["parts"] is None else Breakdown(**data["parts"])
    sizes = {name: tuple(data[name]) for name in ("gib", "weights", "between")}
    return Candidate(**{**data, **sizes, "degrees": Degrees.of(**data["degrees"]), "parts": parts})


def model_name(model: Module) -> str:
    """What people call it."""
    return type(as_module(model)).__name__


def weights_key(model: Module) -> str:
    """A digest of the names and shapes of a model's parameters and buffers."""
    module: nn.Module = as_module(model)
    named = [(name, tuple(x.shape)) for name, x in (*module.named_parameters(), *module.named_buffers())]
    return hashlib.blake2b(repr(sorted(named)).encode(), digest_size=6).hexdigest()
