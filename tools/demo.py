"""An unmodified diffusers pipeline on several processes: the same digits as on one, by one call of `port`.

    torchrun --standalone --nproc-per-node 2 -m xdit_ir.tools.demo

Exit status: 0 equal on every rank (and, under PipeFusion, every digit recognised), 1 not so, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers.utils import logging

import xdit_ir as xir
from xdit_ir.errors import ParallelizeError, XditError
from xdit_ir.models import digits
from xdit_ir.tools import demo_show
from xdit_ir.tools.demo_show import ModeRow, Stages

TOLERANCE = 1e-4
OUTPUT = Path("build/demo/digits.png")
ALONE = "one process"
PIPEFUSION = {"patches": 4, "warmup_steps": 1}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo as one rank of the job that torchrun started."""
    args = _parser().parse_args(argv)
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    try:
        return _run(args, modes(_world()))
    except XditError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"demo: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def modes(world: int) -> dict[str, dict[str, int]]:
    """What is shown on `world` processes: a name and the arguments of `port`.

    Raises:
        ParallelizeError: the model does not divide into so many parts.
    """
    if not 2 <= world <= 6:
        raise ParallelizeError(f"the demo's model has 6 blocks: 2 to 6 processes, not {world}; nearest: 2 or 6")
    found = {f"ulysses={world}": {"ulysses": world}}
    if world % 2 == 0:
        found["cfg=2"] = {"cfg": 2} if world == 2 else {"cfg": 2, "ulysses": world // 2}
    return found | {f"pipefusion={world}": {"pipefusion": world, **PIPEFUSION}}


def generate(pipe: Any, steps: int, seed: int) -> torch.Tensor:
    """The ten digits, float32 [10, 1, 64, 64] in [0, 1]; deterministic in `seed`."""
    images: torch.Tensor = pipe(
        class_labels=list(range(10)),
        guidance_scale=2.0,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    ).images
    return images


def _run(args: argparse.Namespace, shown: Mapping[str, Mapping[str, int]]) -> int:
    lead = os.environ["RANK"] == "0"
    stages = Stages(shown=lead)
    if lead:
        demo_show.introduction(shown)
    classifier, labels = digits.load_classifier(), torch.arange(10)
    with stages(ALONE):
        alone = generate(digits.load_pipeline(), args.steps, args.seed)
    rows = [ModeRow.of(ALONE, [alone], alone, classifier.accuracy(alone, labels), exact=True)]
    pictures = {ALONE: alone}
    for name, degrees in shown.items():
        pipe: Any = digits.load_pipeline()
        with stages(name):
            xir.port(pipe, **degrees)
            pictures[name] = images = generate(pipe, args.steps, args.seed)
        exact = "pipefusion" not in degrees
        rows.append(ModeRow.of(name, _from_all_ranks(images), alone, classifier.accuracy(images, labels), exact=exact))
        if lead and name.startswith("ulysses"):
            demo_show.program(pipe.transformer.program)
    if lead:
        demo_show.results(rows, TOLERANCE)
        demo_show.save(pictures, args.output)
    return 0 if all(row.passes(TOLERANCE) for row in rows) else 1


def _from_all_ranks(mine: torch.Tensor) -> list[torch.Tensor]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def _world() -> int:
    if "WORLD_SIZE" not in os.environ:
        raise ParallelizeError("start me with torchrun: torchrun --standalone --nproc-per-node 2 -m xdit_ir.tools.demo")
    return int(os.environ["WORLD_SIZE"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="xdit_ir.tools.demo", description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=12, help="denoising steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the latents (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the sheet (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
