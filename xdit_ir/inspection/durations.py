"""How long operators take on every rank, from sizes and the speeds of a machine."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.mesh import Mesh
from xdit_ir.sharding.buffer_access import over_time
from xdit_ir.sharding.machine import Machine
from xdit_ir.sharding.report import traffic


@dataclass(frozen=True)
class Cost:
    """Seconds on every rank; `travels`: an exchange, of this kind over these mesh dims. `around`: seconds in which keys
    and values travel around a ring, beside the work."""

    seconds: tuple[float, ...]
    sent: tuple[int, ...]
    kind: str = ""
    over: tuple[str, ...] = ()
    travels: bool = False
    around: tuple[float, ...] = ()


class Durations:
    """Of the operators of one program. `over_time`: changes of layout over time are reads and writes of buffers."""

    def __init__(self, mesh: Mesh, machine: Machine, *, over_time: bool = False) -> None:
        self.mesh, self.machine, self.over_time = mesh, machine, over_time
        self._known: dict[fx.Node, Cost] = {}

    def of(self, node: fx.Node) -> Cost:
        """What an operator costs."""
        if node not in self._known:
            self._known[node] = self._cost(node)
        return self._known[node]

    def _cost(self, node: fx.Node) -> Cost:
        idle = (0,) * self.mesh.world_size
        local = self.over_time and over_time(node, self.mesh)
        found = None if local else traffic(node, self.mesh)
        if found is None:
            return Cost(self.machine.work_seconds(node, self.mesh), idle)
        (kind, over), sent = found
        if node.target is ops.ring_attention:
            around = tuple(self.machine.seconds(0, b) for b in sent)
            return Cost(tuple(map(max, self.machine.work_seconds(node, self.mesh), around)), sent, kind, around=around)
        seconds = tuple(self.machine.latency + self.machine.seconds(0, b) for b in sent)
        return Cost(seconds, sent, kind, tuple(over.split("*")), travels=True)
