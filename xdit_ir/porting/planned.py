"""Degrees that nobody gave: planned at the first call, by rank 0 for all."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from xdit_ir import capture
from xdit_ir.api import TracedProgram
from xdit_ir.capture.failures import RaisedByForward
from xdit_ir.capture.inputs import Example
from xdit_ir.degrees import Degrees
from xdit_ir.emission.context import RunOptions
from xdit_ir.errors import ParallelizeError, XditError
from xdit_ir.ir.mesh import FEATURES, MESH_DIMS, TIME, Mesh
from xdit_ir.passes.keeping import ALL_HERE, Keeping
from xdit_ir.planning.hardware import Hardware, hardware_here, hardware_of
from xdit_ir.planning.options import Options
from xdit_ir.planning.plan import Plan
from xdit_ir.planning.planner import USABLE, plan_traced
from xdit_ir.sharding.machine import H100, Machine
from xdit_ir.transport.distributed import Communicator, processes_of_replica
from xdit_ir.transport.spread import host, near, told

LOG = logging.getLogger("xdit_ir")


@dataclass(frozen=True)
class Unplanned:
    """`given` degrees and `patches` are kept; `machine`: None for the one at hand."""

    given: Mapping[str, int]
    patches: int | None
    machine: Machine | None
    keeping: Keeping
    kv_cache_dtype: str = "auto"

    @property
    def parts_weights(self) -> bool:
        """Whether ranks hold parts of weights, whatever else is chosen."""
        return self.keeping.shard or self.keeping.stream or any(self.given.get(name, 1) > 1 for name in FEATURES)

    def choose(
        self, model: nn.Module, example: Callable[[], Example], options: RunOptions, device: torch.device
    ) -> dict[str, Any]:
        """Degrees, patches and the machine for all processes of the job, equal on every rank; nothing where there is
        one process, and a GPU has room for the weights. Ranks hold parts of weights, or have them with the host, only
        where that is given, or the port holds its weights itself. Collective.

        Raises:
            ParallelizeError: on every rank, if the model cannot be captured, or nothing fits.
        """
        count = processes_of_replica(options.data)
        if count == 1 and (not options.loading.holds or self._has_room(model, device)):
            return {}
        communicator = options.communicator(Mesh.of(ulysses=count), device)
        try:
            with communicator.working():
                hosts = communicator.of_all(host())
                mine = self._planned(model, example, hosts, options, device) if communicator.rank == 0 else {}
                first, *_ = communicator.of_all(mine)
                if "refused" in first:
                    raise communicator.agreed(ParallelizeError(first["refused"]))
        finally:
            communicator.close()
        kept = {} if self.patches is None else {"patches": self.patches}
        return {**first["degrees"], **kept, "machine": Machine.of(first["machine"])}

    def _has_room(self, model: nn.Module, device: torch.device) -> bool:
        """Whether the weights alone fit on a GPU."""
        held = {id(x): x.nbytes for x in (*model.parameters(), *model.buffers())}
        return sum(held.values()) <= self._hardware(device).memory * USABLE

    def _hardware(self, device: torch.device) -> Hardware:
        return hardware_here(device) if self.machine is None else hardware_of(self.machine)

    def _planned(
        self,
        model: nn.Module,
        example: Callable[[], Example],
        hosts: Sequence[str],
        options: RunOptions,
        device: torch.device,
    ) -> dict[str, Any]:
        """What rank 0 tells the others: degrees and speeds, or why there are none."""
        try:
            hardware = self._hardware(device)
            if len(set(hosts)) > 1:
                hardware = hardware.on_hosts(near(hosts))
            traced = TracedProgram(capture.trace(model, example()), familiar=True)
            holds, keeping = options.loading.holds, self.keeping
            shard = keeping.shard or (None if holds else False)
            stream = keeping.streamed or (None if holds else False)
            how = Options(shard_weights=shard, stream_weights=stream, features=holds, data=1)
            how = dataclasses.replace(how, kv_cache_dtype=self.kv_cache_dtype)
            made = plan_traced(traced, model, len(hosts), hardware, self.given, how)
            _log(made, hosts)
            return {"degrees": made.best, "machine": dataclasses.asdict(hardware.prices)}
        except RaisedByForward as failure:
            return {"refused": f"degrees cannot be planned, as forward raises {failure.error!r}"}
        except XditError as error:
            return {"refused": f"degrees cannot be planned: {error}; give degrees"}


def unplanned_degrees(
    given: Mapping[str, int],
    patches: int | None,
    machine: Machine | None,
    processes: int,
    keeping: Keeping,
    kv_cache_dtype: str = "auto",
) -> Unplanned | None:
    """What chooses degrees at the first call: where none is given, or those that are leave some of so many processes
    over and others are not given; None: those that are given are all. Raises `ParallelizeError` where mesh dims are
    named that have no degrees yet."""
    known = Mesh.of(**given).world_size
    left, odd = divmod(processes, known)
    more = left > 1 and known > 1 and not odd and set(MESH_DIMS) - {TIME, *FEATURES} - set(given)
    if not more and given:
        return None
    if keeping.along:
        raise ParallelizeError(
            f"{keeping.asked} names mesh dims, whose degrees are left to be planned; give "
            f"them all, such as {keeping.along[0]}={processes // known}, or shard_weights=True"
        )
    return Unplanned(given, patches, machine, keeping, kv_cache_dtype)


def machine_of_job(communicator: Communicator) -> Machine:
    """That by which choices are priced where none is given, the same on every rank: what rank 0 runs on, as it was
    measured or by the name of its GPU, in hosts of so many where there are several; an H100 for CPUs of one host.
    Collective.

    Raises:
        ParallelizeError: on every rank, if the file of what was measured is none.
    """
    hosts = communicator.of_all(host())
    several = len(set(hosts)) > 1
    if not several and communicator.device.type == "cpu":
        return H100
    first, *_ = communicator.of_all(_prices(communicator.device, hosts) if communicator.rank == 0 else {})
    if "refused" in first:
        raise communicator.agreed(ParallelizeError(first["refused"]))
    return Machine.of(first)


def _prices(device: torch.device, hosts: Sequence[str]) -> dict[str, Any]:
    """What rank 0 tells the others of its machine, or why it cannot."""
    try:
        hardware = hardware_here(device)
    except ParallelizeError as error:
        return {"refused": str(error)}
    return dataclasses.asdict((hardware.on_hosts(near(hosts)) if len(set(hosts)) > 1 else hardware).prices)


def mesh_of_job(given: Mapping[str, int], data: int) -> tuple[Mesh, bool]:
    """The mesh of each of `data` replicas for the degrees that are given to `port`, and whether others are planned, so
    that only its size is known."""
    processes = processes_of_replica(data)
    unplanned = unplanned_degrees(given, None, None, processes, ALL_HERE)
    return mesh_until_planned(given, processes, unplanned), unplanned is not None


def mesh_until_planned(given: Mapping[str, int], processes: int, unplanned: Unplanned | None) -> Mesh:
    """Of the degrees that are given; where others are planned, one of as many processes, whatever they divide."""
    return Mesh.of(**given) if unplanned is None else Mesh.of(ulysses=processes)


def saved_data(plan: Plan, data: int) -> int:
    """The replicas of a plan; raises `ParallelizeError` for what is none, and for others beside it."""
    if not isinstance(plan, Plan):
        raise ParallelizeError(f"plan={plan!r:.60} is no xdit_ir.Plan, such as Plan.from_json makes")
    if data not in (1, plan.chosen.data):
        raise ParallelizeError(f"data={data!r} beside plan=, which has data={plan.chosen.data}: give one of them")
    return plan.chosen.data


def saved_steps(plan: Plan, steps: Mapping[str, Any]) -> dict[str, Any]:
    """What else a plan has for stages; raises `ParallelizeError` for another dtype of keys and values beside it."""
    mine, name = plan.best.get("kv_cache_dtype", "auto"), "kv_cache_dtype"
    if steps[name] not in ("auto", mine):
        raise ParallelizeError(f"{name}={steps[name]!r} beside plan=, which has {name}={mine!r}: give one of them")
    return {**steps, name: mine}


def saved_degrees(plan: Plan, given: Mapping[str, int | None], machine: Machine | None) -> tuple[Degrees, Machine]:
    """The degrees of a plan, and the speeds that it was made for; raises `ParallelizeError` for degrees beside it."""
    if also := [f"{name}={size!r}" for name, size in given.items() if size is not None]:
        raise ParallelizeError(f"{', '.join(also)} beside plan=, which has {plan.chosen.degrees}: give one of them")
    return plan.chosen.degrees, plan.speeds if machine is None else machine


def _log(made: Plan, hosts: Sequence[str]) -> None:
    """One line: what was taken, and what came next; one more where that leads from host to host."""
    best = made.chosen
    other = next((f"; next {one.name}: {one.why}" for one in made.candidates if one.legal and one is not best), "")
    LOG.info(
        "%s on %d x %s: took %s, worked out as %.1f ms a step and %.1f GiB%s",
        *(made.model, made.gpus, made.machine, best.name, best.ms, max(best.gib), other),
    )
    if text := told(Mesh.of(**{name: made.best.get(name, 1) for name in MESH_DIMS}), hosts):
        LOG.info(text)
