"""`port`: the one call that makes a model, or the denoisers of a pipeline, parallel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

from torch import nn

from xdit_ir.emission.checkpoint import Loading
from xdit_ir.emission.context import RunOptions
from xdit_ir.emission.execution import Execution
from xdit_ir.errors import ParallelizeError
from xdit_ir.ir.mesh import Mesh
from xdit_ir.passes.divide import check_weights
from xdit_ir.porting.components import split
from xdit_ir.porting.denoisers import replace
from xdit_ir.porting.parts import Parts, not_portable
from xdit_ir.porting.ported import Ported
from xdit_ir.sharding.machine import H100, Machine, checked
from xdit_ir.transport.distributed import check_world_size

Pipe = TypeVar("Pipe")


@overload
def port(model: nn.Module, **options: Any) -> Ported: ...


@overload
def port(model: Pipe, **options: Any) -> Pipe: ...


def port(
    model: Any,
    *,
    cfg: int = 1,
    ulysses: int = 1,
    ring: int = 1,
    pipefusion: int = 1,
    patches: int | None = None,
    warmup_steps: int = 1,
    shard_weights: bool = False,
    machine: Machine = H100,
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
    """A drop-in for `model` whose forward runs on `cfg * pipefusion * ring * ulysses` processes.

    Given a pipeline instead, its denoisers are replaced by their drop-ins, in place, and the pipeline is returned. A
    pipeline is any object with a mapping `components`; its denoisers are the modules there whose forward takes a
    timestep, or those that `denoisers` names. `encode` and `decode` of its autoencoders, and its text encoders, are
    divided over all ranks where that pays; a call for which it does not, or which cannot be divided, runs whole.

    Like torch.compile it does nothing until the first forward, which traces the model for the inputs it gets.
    Inputs of other structure, shapes, dtypes or guarded values get a specialisation of their own. Every process of
    the job (torchrun) does the same, with the same inputs: give all of them the same seed.

    Args:
        cfg, ulysses, ring, pipefusion, patches, warmup_steps, shard_weights, machine: as in
            `TracedProgram.parallelize`; with `shard_weights` a model gives its weights up, as with `release`. Where the
            batch cannot be divided, cfg=2 divides pairs of calls, see `xdit_ir.runtime.pairing`.
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
    mesh = Mesh.of(cfg=cfg, pipefusion=pipefusion, ring=ring, ulysses=ulysses, **further)
    check_world_size(mesh)
    schedule = {**mesh.degrees, "patches": patches, "warmup_steps": warmup_steps, "machine": checked(machine)}
    schedule |= {"shard_weights": True} if shard_weights else {}
    execution = Execution.of(mode, compile, cuda_graph, transport, attention, handshake, timeout)
    check_weights(mesh, shard_weights)
    given_up = shard_weights and mesh.world_size > 1 and weights is None
    loading = Loading(weights, release or given_up)
    if isinstance(model, nn.Module):
        for option, given in (("denoisers", denoisers), ("components", components)):
            if given is not None:
                raise ParallelizeError(f"{option}={given!r} names components of a pipeline, but a module was given")
        return _ported(model, mesh, schedule, RunOptions(execution, loading))
    found, beside = split(model, components, denoisers)
    options = {name: RunOptions(execution, loading.component(name)) for name in (*found, *beside)}
    parts = Parts(mesh, machine, options, asked=components is not None)
    methods, encoders = parts.methods(beside), parts.encoders(beside)

    def stand_in(name: str, module: nn.Module) -> Ported:
        return encoders[name] if name in encoders else _ported(module, mesh, schedule, options[name])

    replace(model, found | {name: beside[name] for name in encoders}, stand_in)
    for method in methods:
        setattr(method.owner, method.name, method)
    return model


def _ported(original: nn.Module, mesh: Mesh, schedule: Mapping[str, Any], options: RunOptions) -> Ported:
    if (reason := not_portable(original)) is not None:
        raise ParallelizeError(reason)
    return Ported(original, mesh, schedule, options)
