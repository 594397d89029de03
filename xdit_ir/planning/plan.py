"""A plan: all ways to use some GPUs for a model, what each takes, and the best one as data."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from xdit_ir.degrees import Degrees
from xdit_ir.errors import ParallelizeError
from xdit_ir.passes.cast_kv_cache import kv_cache_dtype as stored_dtype
from xdit_ir.planning.candidate import HEADER, TEXT, WHOLE, Candidate
from xdit_ir.planning.plain import read
from xdit_ir.reflection.methods import Module, as_module
from xdit_ir.sharding.machine import Machine

# Of what `to_json` writes; another one where files of before cannot be read.
VERSION = 1


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
        data = {"version": VERSION, **dataclasses.asdict(self), "candidates": rows}
        data["memory"] = self.memory if math.isfinite(self.memory) else None  # JSON has no infinity
        return json.dumps(data, indent=1, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Plan:
        """What `to_json` wrote.

        Raises:
            ParallelizeError: it is no plan, or one of another version; names what is wrong in it.
        """
        try:
            data = json.loads(text)
            if not isinstance(data, dict):
                raise ValueError(f"expected names with values, got {data!r:.60}")
            if (version := data.pop("version", VERSION)) != VERSION:
                raise ValueError(f"version = {version!r:.60}: this xdit_ir reads version {VERSION}; make the plan anew")
            unlimited = data.get("memory", 0) is None
            found = read(Plan, {**data, "memory": 1.0} if unlimited else data, readers={Degrees: _degrees})
            return _consistent(dataclasses.replace(found, memory=math.inf) if unlimited else found)
        except ValueError as error:
            raise ParallelizeError(f"this is no plan as Plan.to_json writes it: {error}") from None


def _degrees(data: Any) -> Degrees:
    """As `Degrees.as_dict` gives them."""
    if not isinstance(data, Mapping):
        raise ParallelizeError(f"expected degrees by name, got {data!r:.60}")
    patches = data.get("patches", 1)
    if not isinstance(patches, int) or isinstance(patches, bool) or patches < 1:
        raise ParallelizeError(f"patches={patches!r} is not a positive integer; the nearest legal one is patches=1")
    return Degrees.of(**data)


def _consistent(plan: Plan) -> Plan:
    """The same; raises `ValueError` where its values do not go together."""
    if not plan.candidates:
        raise ValueError("candidates is empty: expected one at least")
    if plan.memory <= 0:
        raise ValueError(f"memory = {plan.memory!r}: expected GiB, a positive number")
    try:
        stored_dtype(plan.kv_cache_dtype)
        for place, one in enumerate(plan.candidates):
            name = one.name  # refuses what is none of `stream_weights`
            if wrong := _wrong(one, plan.gpus, first=place == 0):
                raise ValueError(f"candidates[{place}], {name}: {wrong}")
    except ParallelizeError as error:
        raise ValueError(str(error)) from None
    return plan


def _wrong(one: Candidate, gpus: int, *, first: bool) -> str:
    """What of a candidate does not go together; empty if all does."""
    ranks = one.degrees.ranks
    if one.data < 1 or one.data * ranks != gpus:
        return f"that takes {one.data * ranks} GPUs, but gpus = {gpus}"
    if any(len(sizes) not in (0, ranks) for sizes in (one.gib, one.weights)):
        return f"expected gib and weights of {ranks} ranks each, or none"
    if min((*one.gib, *one.weights, one.ms or 0.0)) < 0:
        return "expected ms, gib and weights that are not negative"
    return "" if first or one.why else "why is empty, which it is of the first only, the best"


def model_name(model: Module) -> str:
    """What people call it."""
    return type(as_module(model)).__name__


def weights_key(model: Module) -> str:
    """A digest of the names and shapes of a model's parameters and buffers."""
    module: nn.Module = as_module(model)
    named = [(name, tuple(x.shape)) for name, x in (*module.named_parameters(), *module.named_buffers())]
    return hashlib.blake2b(repr(sorted(named)).encode(), digest_size=6).hexdigest()
