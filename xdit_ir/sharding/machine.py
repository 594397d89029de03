"""The speeds that choices and schedules are priced with."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import fx

from xdit_ir.errors import ParallelizeError
from xdit_ir.ir.mesh import Mesh
from xdit_ir.sharding.cost import local_flops, written_bytes


@dataclass(frozen=True)
class Machine:
    """Speeds of a GPU and of its links: FLOP/s of a rank, bytes/s that it can send and that its memory can write, the
    seconds before the first byte arrives, and bytes/s that it reads of the host's memory. Defaults: H100 on NVLink.

    Raises:
        ParallelizeError: a speed is no positive number, or the latency a negative one.
    """

    flops: float = 500e12
    bytes: float = 200e9
    memory: float = 1.5e12
    latency: float = 15e-6
    upload: float = 50e9

    def __post_init__(self) -> None:
        for speed in dataclasses.fields(self):
            value = getattr(self, speed.name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not (value > 0 or (value == 0 and speed.name == "latency")):
                raise ParallelizeError(
                    f"Machine({speed.name}={value!r}): expected a positive number, such as {speed.default:g}"
                )

    def __str__(self) -> str:
        links = f"{self.bytes / 1e9:g} GB/s to other ranks after {self.latency * 1e6:g} µs"
        return f"{self.flops / 1e12:g} TFLOP/s, {self.memory / 1e9:g} GB/s of memory, {links}"

    @staticmethod
    def parse(text: str) -> Machine:
        """`bytes=25e9,latency=30e-6`; speeds that are not named are those of the default.

        Raises:
            ParallelizeError: a machine has no such speed, or it is no number of the right sign.
        """
        known, given = ", ".join(speed.name for speed in dataclasses.fields(Machine)), dict[str, float]()
        for item in text.split(","):
            name, _, value = item.strip().partition("=")
            try:
                given[name] = float(value)
                Machine(**given)
            except (TypeError, ValueError):
                raise ParallelizeError(
                    f"{item.strip()!r} is no speed of a machine: expected {known} with a number, such as bytes=25e9"
                ) from None
        return Machine(**given)

    def seconds(self, flops: float, sent: float) -> float:
        """Time of so much work and traffic, not overlapped."""
        return flops / self.flops + sent / self.bytes

    def work_seconds(self, node: fx.Node, mesh: Mesh) -> tuple[float, ...]:
        """Time of an operator on every rank: of its FLOPs, or of writing its result."""
        pairs = zip(local_flops(node, mesh), written_bytes(node, mesh), strict=True)
        return tuple(max(self.seconds(flops, 0), written / self.memory) for flops, written in pairs)


H100 = Machine()


def checked(machine: Machine) -> Machine:
    """The same; raises `ParallelizeError` for what is no machine."""
    if not isinstance(machine, Machine):
        raise ParallelizeError(f"machine={machine!r} is no xdit_ir.Machine, such as Machine(bytes=25e9)")
    return machine
