"""`xdit-ir plan`: which degrees to take for a model on some GPUs, and what each takes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import xdit_ir as xir
from xdit_ir.errors import XditError
from xdit_ir.ir.mesh import MESH_DIMS
from xdit_ir.passes.cast_kv_cache import KV_CACHE_DTYPES
from xdit_ir.planning.hardware import names
from xdit_ir.planning.hardware import parse as machine
from xdit_ir.tools import targets
from xdit_ir.tools.terminal import working, write_text


def add_parser(commands: Any) -> None:
    """Describe the command to argparse."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "plan",
        help="say which degrees to take for a model on some GPUs, and what every choice takes",
        description="All ways to use some GPUs for a model: milliseconds of a step by part, memory of a rank, and why "
        "not; the best first. Worked out from sizes and what a machine can do, nothing is run; needs no GPU.",
    )
    parser.add_argument("model", metavar="MODEL", help=targets.HELP)
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="how many there are (default 8)")
    parser.add_argument(
        "--machine",
        type=machine,
        metavar="M",
        help=f"one of {', '.join(names())}, a file of `calibrate`, or speeds (default: that of the GPUs here, or h100)",
    )
    parser.add_argument(
        "--memory",
        type=_number_or_text,
        metavar="GIB",
        help="that a rank may use, such as 80, or 80GB (default: nearly all)",
    )
    parser.add_argument("--inexact", action="store_true", help="also PipeFusion, which changes results slightly")
    parser.add_argument("--flash", action="store_true", help="FlashAttention is installed where the model will run")
    parser.add_argument(
        "--shard-weights",
        action=argparse.BooleanOptionalAction,
        help="each rank holds a part of the weights (default: where whole ones do not fit)",
    )
    parser.add_argument(
        "--stream-weights",
        nargs="?",
        const=True,
        metavar="STAY",
        help="weights lie in the host's memory, but for as much as may stay on the GPU, such as 20GiB (default: where "
        "nothing else fits)",
    )
    parser.add_argument("--kv-cache-dtype", choices=tuple(KV_CACHE_DTYPES), default="auto", help="as of `generate`")
    parser.add_argument("--data", type=int, metavar="N", help="share the GPUs out over this many replicas")
    for name in MESH_DIMS:
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"keep this many ranks along {name}")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON instead of a table")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write it there, for xdit_ir.Plan.from_json")
    parser.set_defaults(run=run)


def _number_or_text(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def run(args: argparse.Namespace) -> int:
    """Print the plan."""
    given = {name: getattr(args, name) for name in MESH_DIMS if getattr(args, name) is not None}
    with working(f"planning {args.model}"):
        dtype = torch.bfloat16 if targets.is_full_size(args.model) else None
        target = targets.resolve(args.model, device="meta", dtype=dtype)
        made = xir.plan(
            target.model,
            target.example,
            gpus=args.gpus,
            machine=args.machine,
            memory=args.memory,
            exact=not args.inexact,
            flash=args.flash,
            shard_weights=args.shard_weights,
            stream_weights=args.stream_weights,
            data=args.data,
            kv_cache_dtype=args.kv_cache_dtype,
            **given,
        )
    if args.output is not None:
        try:
            args.output.write_text(made.to_json(), encoding="utf-8")
        except OSError as error:
            raise XditError(f"cannot write {args.output}: {error.strerror}") from None
    write_text(made.to_json() if args.json else str(made))
    return 0
