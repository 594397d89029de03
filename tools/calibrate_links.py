"""What the links of a machine can do, measured by all of its processes: sizes in, figures of a `Link` out."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from xdit_ir.tools.calibrate_kernels import Bench, line
from xdit_ir.transport.workspace import HEADER

MIB = 1 << 20
SIZES = (1, 4, 16, 64)  # MiB that a rank has
SMALL = (0.0625, 0.25, 1)
BURST = 20


def collective(bench: Bench) -> dict[str, Any]:
    """An all-to-all by NCCL or gloo, whose kernels take the place of others."""

    def exchange(x: torch.Tensor) -> Callable[[], object]:
        out = torch.empty_like(x)
        return lambda: dist.all_to_all_single(out, x)

    return _measured(bench, "all-to-all by collectives", exchange) | {"hidden": False}


def copy_engines(bench: Bench) -> dict[str, Any]:
    """The same by copies between peers, as `transport="peer"` makes them."""
    from xdit_ir.transport import peer_ops  # needs CUDA

    group = dist.group.WORLD.group_name  # type: ignore[union-attr]
    workspace = peer_ops.open_workspace(HEADER + int(max(SIZES) * MIB), bench.device, group)
    handle, rank, ranks = peer_ops.symmetric(workspace, group), dist.get_rank(), dist.get_world_size()
    others = [(rank + step) % ranks for step in range(1, ranks)]
    wires = [torch.cuda.Stream(bench.device) for _ in others]  # type: ignore[no-untyped-call]

    def exchange(x: torch.Tensor) -> Callable[[], object]:
        piece = x.nbytes // ranks

        def work() -> None:
            main = torch.cuda.current_stream(bench.device)
            for member, wire in zip(others, wires, strict=True):
                wire.wait_stream(main)
                target = handle.buffer_ptrs[member] + HEADER + rank * piece
                peer_ops.copy_bytes(target, x.data_ptr() + member * piece, piece, wire)
            for wire in wires:
                main.wait_stream(wire)
            peer_ops.meet(workspace, group)

        return work

    return _measured(bench, "all-to-all by copy engines", exchange) | {"hidden": True}


def _measured(bench: Bench, what: str, exchange: Callable[[torch.Tensor], Callable[[], object]]) -> dict[str, Any]:
    """Latency and speed, of the slowest rank."""
    taken, ranks = [], dist.get_world_size()
    for size in SIZES if bench.gpu else SMALL:
        x = torch.ones(int(size * MIB) // ranks * ranks, dtype=torch.uint8, device=bench.device)
        seconds = _slowest(bench, exchange(x))
        sent = x.nbytes * (ranks - 1) / ranks
        taken.append((sent, seconds))
        bench.say(f"{what}, {sent / MIB:.3g} MiB to {ranks - 1} others: {seconds * 1e6:.1f} us")
    latency, speed = line(taken)
    return {"ranks": ranks, "bytes": speed, "latency": latency}


def _slowest(bench: Bench, work: Callable[[], object]) -> float:
    """Seconds of an exchange, as often on every rank."""
    found = [_burst(bench, work) for _ in range(4)][1:]
    most = torch.tensor(statistics.median(found), dtype=torch.float64, device=bench.device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return float(most)


def _burst(bench: Bench, work: Callable[[], object]) -> float:
    count = BURST if bench.gpu else BURST // 4
    dist.barrier()
    bench.wait()
    start = time.perf_counter()
    for _ in range(count):
        work()
    bench.wait()
    return (time.perf_counter() - start) / count


def host_exchange(bench: Bench) -> dict[str, float]:
    """What the host takes to start an exchange."""
    x = torch.ones(1024 * dist.get_world_size(), dtype=torch.uint8, device=bench.device)
    out = torch.empty_like(x)
    for count in (5, 100):
        dist.barrier()
        bench.wait()
        start = time.perf_counter()
        for _ in range(count):
            dist.all_to_all_single(out, x)
        taken = (time.perf_counter() - start) / count
    bench.wait()
    return {"host_exchange": taken}
