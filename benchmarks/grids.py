"""Decoders of published size over four and eight ranks: in a row, and on a grid. Nothing is run, and no GPU is needed.

`python benchmarks/grids.py flux-2048px wan-480p`: the part of the work and the exchanges of the busiest rank, what it
sends in halos and in all, and the machines for which `port` takes the grid.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch

import xdit_ir as xir
from xdit_ir.api import ParallelProgram
from xdit_ir.ir import ops
from xdit_ir.ir.graphs import all_graphs
from xdit_ir.ir.mesh import Mesh
from xdit_ir.models.decoders import DECODERS
from xdit_ir.planning import hardware
from xdit_ir.porting.grid import in_a_grid
from xdit_ir.rules.convolutions import RULES as CONVOLUTIONS
from xdit_ir.sharding.cost import relayout_bytes

CASES = ("flux-1024px", "flux-2048px", "wan-480p", "wan-720p")
MACHINES = ("h100", "h100-infiniband", "l20", "rtx4090")
# Of links so slow that a grid is taken for whatever sends less.
SLOWEST = xir.Machine(bytes=1e7)


def line(name: str, parallel: ParallelProgram) -> str:
    report, halos = parallel.report(), list(halos_of(parallel))
    every = [(one.count, one.bytes_per_rank) for one in report.collectives]
    return f"{name}: {report.share:.4f} of the work; {_sum(every)}; of these in front of convolutions {_sum(halos)}"


def halos_of(parallel: ParallelProgram) -> Iterator[tuple[int, int]]:
    """Exchanges whose results convolutions take: how often, and bytes that the busiest rank sends in all of them."""
    for _, graph, times in all_graphs(parallel.ir):
        for node in (node for node in graph.nodes if node.target is ops.halo_exchange):
            if any(getattr(user.target, "overloadpacket", None) in CONVOLUTIONS for user in node.users):
                yield times, times * max(relayout_bytes(node, parallel.mesh))


def _sum(exchanges: Iterable[tuple[int, int]]) -> str:
    counts, sent = zip(*exchanges, strict=True)
    return f"{sum(counts)} exchanges, {sum(sent) / 2**20:.1f} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(CASES), metavar="DECODER", help=", ".join(CASES))
    parser.add_argument("--ranks", type=int, nargs="*", default=[4, 8])
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in given.names:
        with torch.device("meta"):
            vae: Any = DECODERS[name].made().to(torch.bfloat16)
            traced = xir.trace(vae.decode, {"z": torch.empty(DECODERS[name].latents, dtype=torch.bfloat16)})
        for ranks in given.ranks:
            row = Mesh.of(ulysses=ranks)
            grid = in_a_grid(traced.analysed, row, SLOWEST)
            for mesh in dict.fromkeys((row, grid)):
                sides = " x ".join(str(size) for size in mesh.sizes if size > 1)
                print(line(f"{name} over {sides}", traced.parallelize(**mesh.degrees, machine=SLOWEST)), flush=True)
            prices = ((machine, hardware.load(machine).prices) for machine in MACHINES)
            taken = [machine for machine, speeds in prices if in_a_grid(traced.analysed, row, speeds) != row]
            print(f"{name} over {ranks}: the grid is taken on {', '.join(taken) or 'none'} of {', '.join(MACHINES)}")


if __name__ == "__main__":
    main()
