"""What all programs of a model have in common on this rank: its processes, how to run, and where weights come from."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from xdit_ir.emission.code_store import CodeStore
from xdit_ir.emission.code_writer import How
from xdit_ir.emission.codegen import Code, generate
from xdit_ir.emission.compilation import can_fuse, compile_body, prepare
from xdit_ir.emission.execution import Execution
from xdit_ir.emission.fold import fold_constants
from xdit_ir.emission.graph_pool import GraphPool
from xdit_ir.emission.loading import Loading
from xdit_ir.emission.shared import SharedCodes
from xdit_ir.emission.state import ModelWeights
from xdit_ir.emission.structure import program_key
from xdit_ir.emission.weight_store import WeightStore
from xdit_ir.errors import ParallelizeError
from xdit_ir.ir.garbage import collector_paused
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.program import Program, called_block
from xdit_ir.passes.base import run_passes
from xdit_ir.passes.contract import Pass
from xdit_ir.passes.order import peer_passes
from xdit_ir.passes.pack_exchanges import PackExchanges, packs
from xdit_ir.passes.use_copy_engines import candidates
from xdit_ir.transport.distributed import Communicator
from xdit_ir.transport.workspaces import Workspaces


@dataclass(frozen=True)
class RunOptions:
    """Options of `emit` and `port`: how to run, where weights come from, and the number of replicas (`data`)."""

    execution: Execution = field(default_factory=Execution)
    loading: Loading = field(default_factory=Loading)
    data: int = 1

    def context(self, model: nn.Module, mesh: Mesh, device: torch.device) -> RankContext:
        """For the programs of a model on `device`. Collective.

        Raises:
            ParallelizeError: an option does not exist, or `device` cannot do it; or the job has another number of
                processes than the mesh.
        """
        execution = self.execution.on(device)
        execution.check(device)
        if execution.compile:
            prepare()
        communicator = self.communicator(mesh, device)
        return RankContext(model, communicator, execution, self.loading.store(model, device))

    def communicator(self, mesh: Mesh, device: torch.device) -> Communicator:
        """Of the ranks of this process's replica."""
        execution = self.execution
        return Communicator(mesh, device, handshake=execution.handshake, timeout=execution.limit, data=self.data)


@contextmanager
def on_all_ranks(mesh: Mesh, options: RunOptions) -> Iterator[None]:
    """What is raised inside, before this rank could tell the others anything, ends their waiting for it too."""
    try:
        yield
    except Exception as error:
        if mesh.world_size > 1 and options.execution.handshake:
            _tell_others(mesh, options, error)
        raise


def _tell_others(mesh: Mesh, options: RunOptions, error: Exception) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with suppress(ParallelizeError):  # of a job that has no other processes
        communicator = options.communicator(mesh, device)
        with suppress(type(error)), communicator.working():
            raise error


@dataclass(frozen=True, eq=False)
class RankContext:
    """One for each model, device and process; `store` gives this rank its weights."""

    model: nn.Module
    communicator: Communicator
    execution: Execution
    store: WeightStore | ModelWeights

    @cached_property
    def graph_pool(self) -> GraphPool:
        """The memory of all CUDA graphs."""
        return GraphPool(self.device)

    @cached_property
    def shared_codes(self) -> SharedCodes:
        """Compiled code that serves any number of tokens."""
        return SharedCodes(self.device, store=CodeStore.of(self.device))

    @cached_property
    def workspaces(self) -> Workspaces:
        """Where exchanges by copy engines land."""
        return Workspaces(self.device, self.communicator.release)

    @cached_property
    def _verified(self) -> set[Hashable]:
        """The structures of programs that were verified after every pass for the device, see `run_passes`."""
        return set()

    @property
    def rank(self) -> int:
        """This process's."""
        return self.communicator.rank

    @property
    def device(self) -> torch.device:
        """Where programs run."""
        return self.communicator.device

    @property
    def parameters(self) -> inspect.Signature:
        """Of the model's forward."""
        return inspect.signature(self.model.forward)

    def code(self, program: Program, *, peers: bool = False, packed: bool = False, shared: bool = False) -> Code:
        """A program as code, compiled if that is wanted.

        Args:
            packed: exchanges may be packed, those that all ranks can pack, and started without PyTorch's functional
                layer; all ranks call this together then.
            peers: exchanges inside blocks may go over the GPU's peers, those that all ranks can do so, and parts of
                weights lie where other ranks can read them; all ranks call this together then.
            shared: the code of a block may serve other programs too.
        """
        with torch.no_grad():
            folded = fold_constants(program)
        joined: list[Pass] = []
        if packed and (agreed := self.communicator.in_common(packs(folded))):
            joined = [PackExchanges("/".join(agreed))]
        key = program_key(folded)
        kind = None if key is None else (key, *joined)
        lowered = run_passes(folded, [*joined, *self.execution.passes(self.device)], familiar=kind in self._verified)
        if kind is not None:
            self._verified.add(kind)
        if peers:
            agreed = self.communicator.in_common(candidates(lowered))
            lowered = run_passes(lowered, peer_passes(self.communicator.rank, agreed))
        with collector_paused():
            code = self._generated(lowered, packed=packed, peers=peers)
        if self.execution.compile:
            self._compile(code, shared=shared)
        return code

    def _compile(self, code: Code, *, shared: bool) -> None:
        if code.mailbox is not None:
            code.mailbox.register()
        times = Counter(map(called_block, code.program.calls))
        failed = None if self.execution.forced else code.note
        for name, body in code.bodies.items():
            if can_fuse(body.module.graph):
                native = code.note if self.execution.launches_itself(self.device, times[name]) else None
                codes = self.shared_codes if shared else None
                compile_body(body.module, codes, fixed=body.uses_mailbox, failed=failed, native=native)

    def _generated(self, program: Program, *, packed: bool, peers: bool) -> Code:
        plain, at_once = self.execution.is_plain, packed and self.execution.exchanges_at_once
        how = How(plain=plain, direct=packed and plain, at_once=at_once, pulls=peers)
        return generate(program, self.communicator, self.device, how)
