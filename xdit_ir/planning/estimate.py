"""What a parallel program takes: milliseconds of a step by part, memory of every rank."""

from __future__ import annotations

from dataclasses import dataclass

from xdit_ir.api import ParallelProgram
from xdit_ir.planning.hardware import GIB, Hardware
from xdit_ir.planning.schedule import schedule
from xdit_ir.planning.work import WorkKind


@dataclass(frozen=True)
class Breakdown:
    """Milliseconds of a step on the rank that computes longest: matrix products, attention, all else that it computes;
    what it waits for others, exchanges that nothing hides among it; and what the host takes longer than all that."""

    products: float
    attention: float
    rest: float
    exchanges: float
    host: float

    @property
    def computed(self) -> float:
        """Those in which the rank computes."""
        return self.products + self.attention + self.rest


@dataclass(frozen=True)
class Estimate:
    """Of one step, under PipeFusion of a displaced one: milliseconds, GiB and GiB of weights of each rank's GPU, and
    which part of the step a rank computes on average; kernels and exchanges that the slowest one starts."""

    ms: float
    parts: Breakdown
    gib: tuple[float, ...]
    weights: tuple[float, ...]
    busy: float
    kernels: int = 0
    exchanges: int = 0


def estimate(
    parallel: ParallelProgram, hardware: Hardware, *, flash: bool = False, recorded: bool | None = None
) -> Estimate:
    """Worked out for compiled blocks, `recorded` in CUDA graphs (default: where the machine has them); `flash`:
    attention by FlashAttention as installed, instead of PyTorch's."""
    found, report = schedule(parallel, hardware, flash=flash), parallel.report()
    last, step = found.step()
    ranks = range(parallel.world_size)
    slowest = max(ranks, key=lambda rank: found.seconds(rank, last))
    clock = found.clocks[slowest]
    worked = {kind: clock.work[last, kind] * 1e3 for kind in WorkKind}
    started = clock.kernels[last] * hardware.host + clock.exchanges[last] * hardware.host_exchange
    direct = not (hardware.graphs if recorded is None else recorded)
    host = max(started - step, 0.0) if direct else 0.0
    parts = Breakdown(
        products=worked[WorkKind.PRODUCT],
        attention=worked[WorkKind.ATTENTION],
        rest=worked[WorkKind.MEMORY],
        exchanges=(step - found.seconds(slowest, last)) * 1e3,
        host=host * 1e3,
    )
    return Estimate(
        ms=(step + host) * 1e3,
        parts=parts,
        gib=tuple(one.total / GIB for one in report.memory),
        weights=tuple(
            (size - one.host) / GIB for size, one in zip(report.weight_bytes_per_rank, report.memory, strict=True)
        ),
        busy=sum(found.seconds(rank, last) for rank in ranks) / len(ranks) / max(step, 1e-12),
        kernels=clock.kernels[last],
        exchanges=clock.exchanges[last],
    )
