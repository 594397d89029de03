"""Ulysses exchanges by three transports: `torchrun --standalone --nproc-per-node 2 benchmarks/transports.py`.

Layers of projections and attention on divided tokens, recorded as one CUDA graph: xdit-ir's copy engines, xdit-ir's
collectives (NCCL), and the same layers by hand around FlashInfer's `UlyssesCommunicator` (left out, with a line, where
flashinfer is not installed). `alone` is the whole on one GPU. Prints a JSON line for each; outputs are compared first.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import xdit_ir as xir

SHAPES = {  # tokens, heads, head width
    "flux-1024px": (4608, 24, 128),
    "flux-2048px": (16896, 24, 128),
    "wan-480p": (32760, 12, 128),
}
Forward = Callable[[torch.Tensor], torch.Tensor]


class Layer(nn.Module):
    """x + out(attention(q(x), k(x), v(x)))."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(heads * width, heads * width) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)) for project in (self.q, self.k, self.v))
        return x + self.out(self.attend(q, k, v).flatten(2))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """All (batch, tokens, heads, width)."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class FlashInferLayer(Layer):
    """The same on one rank's tokens: heads are divided around attention by `communicator`."""

    communicator: Any

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """As in `Layer`, of this rank's tokens."""
        q, k, v = (self.communicator.scatter_heads(x.contiguous()) for x in (q, k, v))
        return self.communicator.gather_heads(super().attend(q, k, v).contiguous())


def layers(kind: type[Layer], count: int, heads: int, width: int, device: torch.device) -> nn.Sequential:
    """Equal random weights in bf16 for every kind and rank."""
    torch.manual_seed(0)
    return nn.Sequential(*(kind(heads, width) for _ in range(count))).to(device, torch.bfloat16)


def recorded(forward: Forward, x: torch.Tensor) -> Forward:
    """`forward` as one CUDA graph for inputs like `x`."""
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(2):
            forward(x)
    torch.cuda.synchronize()
    dist.barrier()
    torch.cuda.synchronize()
    graph, given = torch.cuda.CUDAGraph(), x.clone()
    with torch.cuda.graph(graph):
        result = forward(given)

    def replay(x: torch.Tensor) -> torch.Tensor:
        given.copy_(x)
        graph.replay()
        return result

    return replay


def flashinfer(count: int, heads: int, width: int, x: torch.Tensor, stack: ExitStack) -> Forward:
    """Rank's tokens in, all tokens out (that last gather is not recorded, nor timed)."""
    from flashinfer.comm import UlyssesCommunicator

    mine = x.chunk(dist.get_world_size(), 1)[dist.get_rank()].contiguous()
    communicator = UlyssesCommunicator(max_elems=mine.numel(), dtype=mine.dtype, backend="nvlink", device=x.device)
    stack.enter_context(communicator)
    model = layers(FlashInferLayer, count, heads, width, x.device)
    for layer in model:
        layer.communicator = communicator  # type: ignore[assignment]
    forward = recorded(model, mine)
    return lambda x: forward(x.chunk(dist.get_world_size(), 1)[dist.get_rank()])


def contenders(count: int, heads: int, width: int, x: torch.Tensor, stack: ExitStack) -> Iterator[tuple[str, Forward]]:
    """Name and forward of each."""
    plain = layers(Layer, count, heads, width, x.device)
    yield "alone", recorded(plain, x)
    for transport in ("auto", "collective"):
        ported = xir.port(
            layers(Layer, count, heads, width, x.device),
            ulysses=dist.get_world_size(),
            cuda_graph=True,
            transport=transport,
            attention="sdpa",
        )
        yield f"xdit-ir {transport}", ported
    try:
        yield "flashinfer", flashinfer(count, heads, width, x, stack)
    except ImportError as error:
        if dist.get_rank() == 0:
            print(f"flashinfer left out: {error}", flush=True)


def times(forward: Forward, x: torch.Tensor, samples: int, burst: int) -> list[float]:
    """Milliseconds a call, of bursts that start together."""
    found = []
    for _ in range(samples + 2):
        dist.barrier()
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(burst):
            forward(x)
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) / burst)
    return found[2:]


@torch.inference_mode()
def compare(name: str, count: int, samples: int, burst: int, device: torch.device) -> None:
    """All contenders on one shape."""
    tokens, heads, width = SHAPES[name]
    make = torch.Generator(device).manual_seed(1)
    x = torch.randn(1, tokens, heads * width, device=device, dtype=torch.bfloat16, generator=make)
    wanted: torch.Tensor | None = None
    with ExitStack() as stack:
        for label, forward in contenders(count, heads, width, x, stack):
            output = forward(x).float().clone()
            if output.shape != x.shape:
                parts = [torch.empty_like(output) for _ in range(dist.get_world_size())]
                dist.all_gather(parts, output.contiguous())
                output = torch.cat(parts, 1)
            wanted = output if wanted is None else wanted
            found = times(forward, x, samples, burst)
            row = {
                "shape": name,
                "contender": label,
                "layer_us": round(statistics.median(found) * 1e3 / count, 1),
                "range_us": [round(edge * 1e3 / count, 1) for edge in (min(found), max(found))],
                "difference": round(((output - wanted).norm() / wanted.norm()).item(), 5),
            }
            if dist.get_rank() == 0:
                print(json.dumps(row), flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"of {', '.join(SHAPES)} (default all)")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--burst", type=int, default=5)
    arguments = parser.parse_args()
    if unknown := set(arguments.shapes) - set(SHAPES):
        parser.error(f"unknown shapes {', '.join(sorted(unknown))}: expected some of {', '.join(SHAPES)}")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    for name in arguments.shapes or SHAPES:
        compare(name, arguments.layers, arguments.samples, arguments.burst, device)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # communicators that graphs recorded would wait for each other when destroyed


if __name__ == "__main__":
    main()
