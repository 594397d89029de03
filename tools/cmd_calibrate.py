"""`xdit-ir calibrate`: measures this machine, for plans."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from xdit_ir.errors import XditError
from xdit_ir.planning import measured

SECONDS = 100.0  # after which nothing more is begun
PROCESSES = 64  # on CPUs
ENDED = 80.0  # after these, what is under way is ended


def add_parser(commands: Any) -> None:
    """Describe the command to argparse."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "calibrate",
        help="measure this machine, for plans",
        description="Measures products, attention, what is bound by memory, and exchanges between all processes, in at "
        "most two minutes, and writes a machine file, which plans for this machine take by themselves afterwards.",
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="processes (default: all GPUs; two on CPUs)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is a GPU")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: in the user's cache folder")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"begin nothing after (default {SECONDS:g})")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Start the processes and wait for what they write."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    most = torch.cuda.device_count() if device == "cuda" else PROCESSES
    if not most:
        raise XditError("--device cuda: this machine has no GPU; nearest legal: --device cpu")
    gpus = args.gpus if args.gpus is not None else most if device == "cuda" else 2
    if not 0 < gpus <= most:
        raise XditError(f"--gpus {gpus}: expected 1 to {most} on {device}; nearest legal: {min(max(gpus, 1), most)}")
    if not 0 < args.seconds < float("inf"):
        raise XditError(f"--seconds {args.seconds:g}: expected a positive number, such as {SECONDS:g}")
    output = args.output or measured.folder() / measured.file_name(measured.device_name(torch.device(device)))
    if args.output is not None and not output.parent.is_dir():
        raise XditError(f"--output {output}: there is no folder {output.parent}")
    if output.is_dir():
        raise XditError(f"--output {output} is a folder: expected a file, such as {output / 'here.toml'}")
    before = output.stat().st_mtime_ns if output.exists() else 0
    worker = ["-m", "xdit_ir.tools.calibrate_worker", "--device", device, "--output", str(output)]
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"] if gpus > 1 else []
    command = [sys.executable, *start, *worker, "--seconds", str(args.seconds)]
    try:
        status = subprocess.run(command, check=False, timeout=args.seconds + ENDED).returncode
    except subprocess.TimeoutExpired:
        status = 1
        print("ended: what was under way did not end by itself")
    if not output.exists() or output.stat().st_mtime_ns == before:
        raise XditError(f"nothing was written to {output}, see above (exit status {status})")
    print(f"written to {output}; --machine {output.stem if args.output is None else output}")
    return status
