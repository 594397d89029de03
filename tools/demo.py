"""An unmodified diffusers pipeline on several processes: the same image as on one, by one call of `port`.

    torchrun --standalone --nproc-per-node 2 -m xdit_ir.tools.demo

Exit status: 0 equal on every rank, 1 different, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import xdit_ir as xir
from xdit_ir.errors import ParallelizeError, XditError
from xdit_ir.tools import demo_show
from xdit_ir.tools.degrees import Degrees
from xdit_ir.tools.demo_pipeline import build_pipeline, generate
from xdit_ir.tools.demo_show import Difference, Stages

TOLERANCE = 1e-4
OUTPUT = Path("build/demo/flux_single_vs_parallel.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo as one rank of the job that torchrun started."""
    args = _parser().parse_args(argv)
    torch.set_num_threads(1)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns about image processors, unused here
    try:
        return _run(args, _degrees(args))
    except XditError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"demo: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _run(args: argparse.Namespace, degrees: Degrees) -> int:
    lead = os.environ["RANK"] == "0"
    stages = Stages(shown=lead)
    if lead:
        demo_show.introduction(degrees)
    with stages("build a tiny FluxPipeline"):
        pipe: Any = build_pipeline(args.seed)

    def image(what: str) -> torch.Tensor:
        with stages(what, args.steps) as advance:
            return generate(pipe, args.steps, args.seed, images=max(1, degrees.cfg), on_step=advance)

    alone = image("one process: generate")
    pipe.transformer = xir.port(pipe.transformer, **degrees.as_dict())
    together = image(f"{degrees.ranks} processes: port, trace, generate")
    again = image(f"{degrees.ranks} processes: generate again")

    mine = Difference.of(together, alone), Difference.of(again, alone)
    found = _from_all_ranks(max(mine, key=lambda difference: difference.relative))
    equal = all(difference.relative <= TOLERANCE for difference in found)
    if lead:
        demo_show.program(pipe.transformer.program)
        demo_show.differences(found, TOLERANCE)
        demo_show.save(alone, together, args.output)
    return 0 if equal else 1


def _from_all_ranks(mine: Difference) -> list[Difference]:
    if not dist.is_initialized():
        return [mine]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def _degrees(args: argparse.Namespace) -> Degrees:
    """The degrees asked for, by default Ulysses over all processes."""
    if "WORLD_SIZE" not in os.environ:
        raise ParallelizeError("start me with torchrun: torchrun --standalone --nproc-per-node 2 -m xdit_ir.tools.demo")
    world = int(os.environ["WORLD_SIZE"])
    asked = Degrees(cfg=args.cfg or 1, ring=args.ring or 1, ulysses=args.ulysses or 1)
    if not any((args.cfg, args.ring, args.ulysses)):
        return Degrees(ulysses=world)
    if asked.ranks != world:
        raise ParallelizeError(
            f"these degrees make {asked.ranks} ranks, but there are {world} processes: start with "
            f"--nproc-per-node {asked.ranks}, or give no degrees"
        )
    return asked


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="xdit_ir.tools.demo", description=__doc__.partition("\n")[0])
    for name in ("ulysses", "ring", "cfg"):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"ranks along {name}")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, text and latents (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the picture (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
