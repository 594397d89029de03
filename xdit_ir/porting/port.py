"""`port`: the one call that makes a model, or the denoisers of a pipeline, parallel."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

from torch import nn

from xdit_ir.caching.rule import CacheRule
from xdit_ir.emission.context import RunOptions
from xdit_ir.emission.execution import Execution
from xdit_ir.emission.loading import Loading
from xdit_ir.errors import ParallelizeError
from xdit_ir.ir.mesh import FEATURES, TIME, Mesh, check_degree_names
from xdit_ir.passes.divide import check_cache, check_schedule
from xdit_ir.passes.keeping import Keeping
from xdit_ir.passes.trim_padding import rows_to_trim
from xdit_ir.planning.plan import Plan
from xdit_ir.porting.components import split
from xdit_ir.porting.denoisers import replace
from xdit_ir.porting.parts import PortedParts, not_portable
from xdit_ir.porting.planned import (
    Unplanned,
    mesh_until_planned,
    saved_data,
    saved_degrees,
    saved_steps,
    unplanned_degrees,
)
from xdit_ir.porting.ported import Ported
from xdit_ir.sharding.machine import Machine, checked
from xdit_ir.transport.distributed import check_world_size, processes_of_replica
from xdit_ir.transport.replicas import checked_data

Pipe = TypeVar("Pipe")


@overload
def port(model: nn.Module, **options: Any) -> Ported: ...


@overload
def port(model: Pipe, **options: Any) -> Pipe: ...


def port(
    model: Any,
    *,
    cfg: int | None = None,
    ulysses: int | None = None,
    ring: int | None = None,
    pipefusion: int | None = None,
    tensor: int | None = None,
    patches: int | None = None,
    warmup_steps: int = 1,
    kv_cache_dtype: str = "auto",
    data: int = 1,
    plan: Plan | None = None,
    shard_weights: bool | str | Sequence[str] = False,
    stream_weights: bool | int | str = False,
    cache: str | None = None,
    trim_padding: bool | int = False,
    machine: Machine | None = None,
    mode: str = "auto",
    compile: bool | None = None,
    cuda_graph: bool | None = None,
    transport: str = "auto",
    attention: str = "auto",
    handshake: bool = True,
    timeout: float | None = None,
    weights: str | Path | None = None,
    release: bool = False,
    denoisers: Sequence[str] | None = None,
    components: Sequence[str] | None = None,
    **further: int,
) -> Any:
    """A drop-in for `model` whose forward runs on `cfg * pipefusion * ring * ulysses * tensor` processes.

    Without degrees it runs on all processes of the job: rank 0 works out at the first call which degrees are the
    fastest, of those that compute what one process would, and logs what it took (see `xdit_ir.plan`).

    Given a pipeline instead, its denoisers are replaced by their drop-ins, in place, and the pipeline is returned. A
    pipeline is any object with a mapping `components`; its denoisers are the modules there whose forward takes a
    timestep, or those that `denoisers` names. `encode` and `decode` of its autoencoders, and its text encoders, are
    divided over all ranks where that pays; a call for which it does not, or which cannot be divided, runs whole. With
    `shard_weights` or `stream_weights` text encoders give their weights up too, all of them.

    Like torch.compile it does nothing until the first forward, which traces the model for the inputs it gets.
    Inputs of other structure, shapes, dtypes or guarded values get a specialisation of their own. Every process of
    the job (torchrun) does the same, with the same inputs: give all of them the same seed.

    Args:
        cfg, ulysses, ring, pipefusion, tensor, patches, warmup_steps, kv_cache_dtype, shard_weights, stream_weights,
            cache, trim_padding, machine: as in `TracedProgram.parallelize`; with `shard_weights` or `stream_weights`
            a model gives its weights up, as with `release`. Where the batch cannot be divided, `cfg` divides the calls
            of a step, see `xdit_ir.runtime.pairing`. Degrees that are left out are planned if none is given, or if
            those above 1 leave processes over; else they are 1.
        data: as many replicas of all that, over as many times the processes. Each makes what it is asked for: the
            caller gives the processes of a replica the same inputs, and each replica other ones, see
            `xdit_ir.replica`. Replicas never wait for each other, nor are they compared.
        plan: degrees as `xdit_ir.plan` has found them; it must be for this model and number of processes.
        mode, compile, cuda_graph, transport, attention, handshake, timeout: as in
            `xdit_ir.emission.execution.Execution`; `mode` decides where neither `compile` nor `cuda_graph` is given.
        weights, release: as in `xdit_ir.emission.checkpoint.Loading`. For a pipeline: `weights` is the folder with a
            folder for each component, as its `save_pretrained` writes it.
        denoisers: the names of the components that are denoisers; nothing else is divided then.
        components: the names of all that is divided, if not what pays: denoisers, or modules of which the methods
            `encode` and `decode` are, or else the forward. What of them cannot be divided raises.

    Raises:
        ParallelizeError: a degree is unknown or no positive integer, the job has another number of processes, or a
            pipeline has no denoiser; at the first forward, also if a degree is illegal for the model and its inputs.
    """
    data = data if plan is None else saved_data(plan, data)
    check_degree_names(further, inspect.signature(port).parameters)
    named = {"cfg": cfg, "pipefusion": pipefusion, "ring": ring, "ulysses": ulysses, "tensor": tensor, **further}
    keeping = Keeping.of(shard_weights, stream_weights)
    rows = rows_to_trim(trim_padding)
    steps = {"warmup_steps": warmup_steps, "kv_cache_dtype": kv_cache_dtype}
    division = _Division.of(named, plan, patches, steps, machine, data, keeping=keeping, cache=cache, rows=rows)
    execution = Execution.of(mode, compile, cuda_graph, transport, attention, handshake, timeout)
    beside_loading = Loading(weights, release)  # parts of weights are copies, which a port holds itself
    loading = Loading(weights, release or (weights is None and division.parts_weights))
    if isinstance(model, nn.Module):
        for option, names in (("denoisers", denoisers), ("components", components)):
            if names is not None:
                raise ParallelizeError(f"{option}={names!r} names components of a pipeline, but a module was given")
        return division.ported(model, RunOptions(execution, loading, data))
    found, beside = split(model, components, denoisers)
    loadings = {name: loading.component(name) for name in found}
    loadings |= {name: beside_loading.component(name) for name in beside}
    options = {name: RunOptions(execution, one, data) for name, one in loadings.items()}
    machine, keeping = division.schedule["machine"], division.keeping
    parts = PortedParts(division.mesh, machine, options, keeping, asked=components is not None)
    methods, encoders = parts.methods(beside), parts.encoders(beside)

    def stand_in(name: str, module: nn.Module) -> Ported:
        return encoders[name] if name in encoders else division.ported(module, options[name])

    replace(model, found | {name: beside[name] for name in encoders}, stand_in)
    for method in methods:
        setattr(method.owner, method.name, method)
    return model


@dataclass(frozen=True)
class _Division:
    """How models are divided over the `processes` of a replica: `schedule` is what `parallelize` gets; its `machine` is
    found at the first call if it is None. If `unplanned`, all that, and the mesh, are chosen then; a `plan` is for one
    model."""

    processes: int
    mesh: Mesh
    schedule: Mapping[str, Any]
    unplanned: Unplanned | None
    plan: Plan | None
    keeping: Keeping

    @staticmethod
    def of(
        named: Mapping[str, int | None],
        plan: Plan | None,
        patches: int | None,
        steps: Mapping[str, Any],
        machine: Machine | None,
        data: int,
        *,
        keeping: Keeping,
        cache: str | None,
        rows: int,
    ) -> _Division:
        """By degrees, of which those that are None are not given, or by a plan; `steps`: what else `parallelize` takes
        of PipeFusion. Raises `ParallelizeError`."""
        given = {name: size for name, size in named.items() if size is not None}
        if plan is not None:
            degrees, machine = saved_degrees(plan, {**named, "patches": patches}, machine)
            patches, given, steps = degrees.patches, dict(degrees.mesh.degrees), saved_steps(plan, steps)
            keeping = keeping.joined(plan.chosen.keeping)
        known = None if machine is None else checked(machine)
        processes = processes_of_replica(checked_data(data))
        unplanned = unplanned_degrees(given, patches, known, processes, keeping, steps["kv_cache_dtype"])
        mesh = mesh_until_planned(given, processes, unplanned)
        check_world_size(mesh, data)
        keeping.check(mesh)
        check_schedule(given.get(TIME, 1), None, stages=None, **steps)
        schedule: dict[str, Any] = {
            **mesh.degrees,
            **keeping.options,
            "patches": patches,
            **steps,
            "machine": known,
        }
        if cache is not None:
            check_cache(CacheRule.parse(cache), mesh)
            schedule["cache"] = cache
        if rows:
            schedule["trim_padding"] = rows
        return _Division(processes, mesh, schedule, unplanned, plan, keeping)

    @property
    def parts_weights(self) -> bool:
        """Whether ranks hold parts of weights, and models give theirs up."""
        chosen = self.unplanned is not None and self.unplanned.parts_weights
        return chosen or self.keeping.gives_up(self.mesh) or self.mesh.size(FEATURES) > 1

    def ported(self, original: nn.Module, options: RunOptions) -> Ported:
        """The drop-in for a module; raises `ParallelizeError` for one that cannot be divided."""
        if (reason := not_portable(original)) is not None:
            raise ParallelizeError(reason)
        if self.plan is not None:
            self.plan.check(original, self.processes * self.plan.chosen.data)
        return Ported(original, self.mesh, self.schedule, options, unplanned=self.unplanned)
