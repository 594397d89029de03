"""Weights that are gathered or uploaded when they are needed: how much, how much of it is there at a time, how long
uploads take, and what of that other work hides."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.program import LAYOUT, SPEC, STORED, Program, TensorSpec, called_block, is_block_call
from xdit_ir.ir.stored import source_of
from xdit_ir.sharding.machine import Machine


@dataclass(frozen=True)
class GatheredWeights:
    """Bytes that are gathered in a forward, bytes that the fullest rank uploads from the host's memory in one, and of
    all these the most that are on a device at a time. By the machine's figures: seconds that uploads take,
    seconds of these in which a rank has nothing else to do (`exposed`), and seconds in which it works."""

    total: int = 0
    most: int = 0
    uploaded: int = 0
    seconds: float = 0.0
    exposed: float = 0.0
    worked: float = 0.0

    @property
    def excess(self) -> int:
        """Bytes that would have to stay on the GPU besides, for work to hide all uploads, or nearly all."""
        if not self.exposed:
            return 0
        return max(math.ceil(self.uploaded * (1 - self.worked / self.seconds)), 0)

    @property
    def upload_text(self) -> str:
        """What uploads are, in a line or two."""
        hidden = self.seconds - self.exposed
        text = (
            f"weights lie in the host's memory: a rank uploads {self.uploaded / 2**20:.1f} MiB a forward, "
            f"{self.most / 2**20:.1f} MiB are on the device at a time; that takes {self.seconds * 1e3:.1f} ms, of "
            f"which {hidden * 1e3:.1f} are hidden under computation and {self.exposed * 1e3:.1f} are not (worked out, "
            "not measured)"
        )
        if not self.excess:
            return text
        bus = self.uploaded / self.worked / 1e9 if self.worked else math.inf
        return (
            f"{text}\nto hide all of it, {self.excess / 2**30:.2f} GiB more of a rank's weights would have to stay on "
            f"the GPU, or the bus would have to give {bus:.1f} GB/s"
        )


NONE_GATHERED = GatheredWeights()


def gathers_weights(node: fx.Node) -> bool:
    """Whether a node gathers stored weights."""
    return node.target is ops.gather and str(source_of(node).target).startswith(f"{STORED}.")


def brings_weights(node: fx.Node) -> bool:
    """Whether a node gathers or uploads stored weights."""
    return node.target is ops.upload or gathers_weights(node)


def gathered_weights(program: Program, machine: Machine) -> GatheredWeights:
    """Those of a program with layouts."""
    mesh = program.mesh
    assert mesh is not None
    place = {node: index for index, node in enumerate(program.graph.nodes)}
    brought = {node: local_most(node, mesh) for node in place if brings_weights(node)}
    changes: list[tuple[int, int]] = []
    for node, size in brought.items():
        changes += [(place[node], size), (max(map(place.__getitem__, _until(node))) + 1, -size)]
    held, most = 0, 0
    for _, size in sorted(changes):
        held += size
        most = max(most, held)
    uploads = {node: size for node, size in brought.items() if node.target is ops.upload}
    total, uploaded = sum(brought.values()) - sum(uploads.values()), sum(uploads.values())
    if not uploads:
        return GatheredWeights(total, most)
    exposed, worked = _exposed(program, mesh, machine, uploads)
    return GatheredWeights(total, most, uploaded, uploaded / machine.upload, exposed, worked)


def local_most(node: fx.Node, mesh: Mesh) -> int:
    """Bytes of a value on the rank that has most of it."""
    spec: TensorSpec = node.meta[SPEC]
    return max(spec.on(node.meta[LAYOUT], rank).nbytes for rank in range(mesh.world_size))


def _until(node: fx.Node) -> Iterator[fx.Node]:
    """What has to be there until these: what uses a value, or views of it, and what awaits its being gathered."""
    for user in node.users:
        yield user
        if user.target is ops.unpack:
            yield from user.users
        elif gathers_weights(user):
            yield next(iter(user.users))


def work_seconds(program: Program, mesh: Mesh, machine: Machine) -> Callable[[fx.Node], float]:
    """Of nodes of the outer graph, what is inside blocks included: seconds of work of the slowest rank. Exchanges take
    no time here."""

    @cache
    def inside(block: str) -> float:
        return sum(map(seconds, program.blocks[block].graph.nodes))

    def seconds(node: fx.Node) -> float:
        if node.op != "call_function" or ops.is_view(node.target) or ops.communicates(node.target):
            return 0.0
        return inside(called_block(node)) if is_block_call(node) else max(machine.work_seconds(node, mesh))

    return seconds


def _exposed(program: Program, mesh: Mesh, machine: Machine, uploads: dict[fx.Node, int]) -> tuple[float, float]:
    """Seconds in which the slowest rank waits for uploads, and in which it works: each upload begins when all before it
    in the program is done and the one before has arrived."""
    seconds = work_seconds(program, mesh, machine)
    now = bus = waited = 0.0
    arrival: dict[fx.Node, float] = {}
    for node in program.graph.nodes:
        there = max((arrival.get(source, 0.0) for source in node.all_input_nodes), default=0.0)
        if node in uploads:
            bus = arrival[node] = max(now, bus) + uploads[node] / machine.upload
        elif (work := seconds(node)) > 0 or ops.communicates(node.target):
            waited += max(there - now, 0.0)
            now = max(there, now) + work
        else:
            arrival[node] = there
    return waited, now - waited
