"""What the exchanges of one attention cost the host: `python benchmarks/exchange_host.py`; on two GPUs
`torchrun --standalone --nproc-per-node 2 benchmarks/exchange_host.py`.

Queries, keys and values of one attention go from tokens to heads, and its result back, as under `ulysses=2`. Without
GPUs tensors are so small that nothing is computed, and the process group is PyTorch's fake one, which moves nothing. So
what is timed are the layers above the process group: cutting, packing, calling, waiting and putting together. On GPUs
it is all that the host does, of exchanges as large as those of FLUX.1-dev at 1024 px, and what they take in all. Prints
microseconds of one thread for each way to do it, median and quartiles, and how often the process group is called.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from timing import quartiles
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from xdit_ir.ir.collective_ops import Reshuffle, Together
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.relayout import RankExchange, plan
from xdit_ir.transport.collectives import lower
from xdit_ir.transport.direct import direct_halves
from xdit_ir.transport.distributed import Communicator

Halves = Sequence[nn.Module]
Exchanged = Callable[..., Sequence[torch.Tensor]]


def one_by_one(halves: Halves) -> Exchanged:
    """Each value by an exchange of its own; all are started before the first is awaited."""
    send, receive = halves
    apart = getattr(receive, "handed", 2)

    def run(*xs: torch.Tensor) -> list[torch.Tensor]:
        sent = [send(x) for x in xs]
        return [receive(one) if apart is None else receive(*one) for one in sent]

    return run


def together(halves: Halves) -> Exchanged:
    """All values by one exchange."""
    send, receive = halves
    apart = getattr(receive, "handed", 2)

    def run(*xs: torch.Tensor) -> Sequence[torch.Tensor]:
        sent = send(*xs)
        found: Sequence[torch.Tensor] = receive(sent) if apart is None else receive(*sent)
        return found

    return run


def ways(
    to_heads: RankExchange, to_tokens: RankExchange, communicator: Communicator
) -> dict[str, tuple[Exchanged, Exchanged]]:
    """How to exchange what goes into an attention, and what comes out of it."""
    group, at = communicator.group(("ulysses",)), communicator.rank
    there, back = (Reshuffle("all_to_all", ("ulysses",), (0, 1), one) for one in (to_heads, to_tokens))
    packed = Together(there.kind, there.mesh_dims, there.group, (there.exchange,) * 3)
    straight = one_by_one(direct_halves([back.exchange], at, group, one=True))
    functional = one_by_one(lower(back, communicator))
    return {
        "functional, one by one": (one_by_one(lower(there, communicator)), functional),
        "functional, packed": (together(lower(packed, communicator)), functional),
        "direct, one by one": (one_by_one(direct_halves([there.exchange], at, group, one=True)), straight),
        "direct, packed": (together(direct_halves(packed.exchanges, at, group, one=False)), straight),
    }


def device_of_job() -> torch.device:
    """That of this process of a job of two GPUs, or the CPU, with a process group that does nothing."""
    if torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl")
        return device
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    return torch.device("cpu")


def in_all(call: Callable[[], object], calls: int = 50) -> float:
    """Microseconds of a call with what GPUs do for it."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e6 / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1000)
    calls = parser.parse_args().calls
    torch.set_num_threads(1)
    device = device_of_job()
    rank, mesh = dist.get_rank(), Mesh.of(ulysses=2)
    communicator = Communicator(mesh, device, handshake=False)
    communicator.prepare([("ulysses",)])
    shape = (1, 8, 4, 8) if device.type == "cpu" else (1, 4608, 24, 128)
    tokens, heads = mesh.divide(shape[1], ("ulysses",)), mesh.divide(shape[2], ("ulysses",))
    rows, columns = Layout((None, tokens, None, None)), Layout((None, None, heads, None))
    to_heads, to_tokens = (plan(mesh, shape, *way).ranks[rank] for way in ((rows, columns), (columns, rows)))
    x, y = (torch.randn(one.held, device=device, dtype=torch.bfloat16) for one in (to_heads, to_tokens))
    with torch.no_grad():
        for name, (before, after) in ways(to_heads, to_tokens, communicator).items():

            def attention(before: Exchanged = before, after: Exchanged = after) -> None:
                before(x, x, x)
                after(y)

            in_all(attention) if device.type == "cuda" else attention()
            lower_, median, upper = quartiles(attention, calls, 1e3)
            count = 4 if "one by one" in name else 2
            said = f", {in_all(attention):.0f} us in all" if device.type == "cuda" else ""
            if rank == 0:
                print(f"{name:24s} {median:7.1f} us ({lower_:.1f} .. {upper:.1f}), {count} calls of the group{said}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
