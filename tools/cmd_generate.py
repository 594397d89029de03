"""`xdit-ir generate`: images and videos from a pipeline's folder, alone or on every process that torchrun started."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from xdit_ir.emission.execution import MODES
from xdit_ir.errors import GenerationError
from xdit_ir.generation import Generation, generate
from xdit_ir.generation.files import FPS
from xdit_ir.generation.folder import parse_dtypes
from xdit_ir.generation.generate import REPORT
from xdit_ir.generation.request import parse_size
from xdit_ir.generation.setup import Setup
from xdit_ir.ir.mesh import DIMS, MESH_DIMS
from xdit_ir.passes.cast_kv_cache import KV_CACHE_DTYPES
from xdit_ir.sharding.machine import Machine
from xdit_ir.sharding.report import CacheUse
from xdit_ir.tools import targets
from xdit_ir.tools.terminal import write


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "generate", help="generate images or videos with a diffusers pipeline, also under torchrun"
    )
    parser.add_argument("pipeline", metavar="FOLDER", help="what save_pretrained of a pipeline wrote, or a hub name")
    what = parser.add_argument_group("what")
    what.add_argument("--prompt", action="append", default=[], help="may be repeated")
    what.add_argument("--prompts", type=Path, metavar="FILE", help="a text file with a prompt on each line")
    what.add_argument("--embeddings", type=Path, metavar="FILE", help="safetensors: tensors by argument, no prompt")
    what.add_argument("--negative", metavar="PROMPT", help="what guidance leads away from")
    what.add_argument("--image", metavar="FILE", help="the image to start from or to edit")
    what.add_argument("--size", metavar="WxH", help="in pixels, e.g. 1024x1024")
    what.add_argument("--frames", type=int, metavar="N", help="of a video")
    what.add_argument("--steps", type=int, metavar="N", help="denoising steps")
    what.add_argument("--guidance", type=float, metavar="G", help="guidance scale")
    what.add_argument("--seed", type=int, default=0, metavar="S", help="of every prompt (default 0)")
    what.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="any argument of the pipeline")
    what.add_argument("--lora", action="append", default=[], metavar="PATH[:SCALE]", help="may be repeated")
    how = add_how(parser, "replicas of all these processes that share the prompts out")
    how.add_argument("--benchmark", type=int, default=0, metavar="N", help="warm up once, then time N generations")
    parser.add_argument("--output", type=Path, default=Path("output"), metavar="DIR", help="default: output")
    parser.add_argument("--fps", type=int, default=FPS, help="of videos (default %(default)s)")
    parser.set_defaults(run=run)


def add_how(parser: argparse.ArgumentParser, data: str) -> Any:
    """The options that say how a pipeline runs; `data` says what replicas do."""
    how = parser.add_argument_group(
        "how", "degrees that are not given: 1, or planned where torchrun has started more processes"
    )
    for dim in DIMS:
        how.add_argument(f"--{dim.name}", type=int, metavar="N", help=f"processes that divide {dim.says}")
    how.add_argument("--patches", type=int, metavar="N", help="of the latents, with --pipefusion")
    how.add_argument("--warmup", type=int, metavar="N", help="synchronous steps, with --pipefusion")
    how.add_argument(
        "--kv-cache-dtype", choices=tuple(KV_CACHE_DTYPES), help="stale keys and values, with --pipefusion"
    )
    how.add_argument("--cache", metavar="RULE", help="steps reuse blocks of earlier ones, e.g. first-block:0.08")
    how.add_argument("--trim-padding", type=int, metavar="N", help=targets.TRIM)
    how.add_argument("--machine", type=Machine.parse, metavar="SPEEDS", help=targets.SPEEDS)
    how.add_argument("--data", type=int, default=1, metavar="N", help=data)
    how.add_argument("--dtype", metavar="TYPE", help="bf16, fp16 or fp32; also bf16,vae=fp32")
    how.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    how.add_argument("--mode", choices=MODES, help="how denoisers run; default: auto, the fastest that works here")
    how.add_argument("--compile", action="store_true", help="compile the blocks of denoisers")
    how.add_argument("--cuda-graph", action="store_true", help="record the denoisers as CUDA graphs")
    how.add_argument("--timeout", type=float, metavar="S", help="seconds to wait for other processes (default 600)")
    how.add_argument("--offload", action="store_true", help="components wait in host memory while others run")
    how.add_argument("--whole", action="store_true", help="load denoisers whole, not only what a rank uses")
    return how


def run(args: argparse.Namespace) -> int:
    """Generate as one process of the job; the first one prints.

    After an error torch.distributed is left as it is: to end it would mean to wait for the others, while the end of
    this process is what makes torchrun stop them.
    """
    mine = not dist.is_initialized()
    generation = generate(args.pipeline, _prompts(args), **_options(args))
    if generation.job.reports:
        _show(generation, args.output)
    if mine:
        generation.close()
    return 0


def _prompts(args: argparse.Namespace) -> list[str]:
    prompts = list(args.prompt)
    if args.prompts is not None:
        try:
            prompts += [line.strip() for line in args.prompts.read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise GenerationError(f"prompts {args.prompts} cannot be read: {error}") from error
    if prompts and args.embeddings is not None:
        raise GenerationError("--embeddings stand for a prompt: expected no --prompt or --prompts beside them")
    if not (prompts or args.embeddings or args.set):
        raise GenerationError("expected --prompt, --prompts, --embeddings, or --set for a pipeline without prompts")
    return prompts


def setup_of(args: argparse.Namespace) -> Setup:
    """One replica of the pipeline, by the options of `add_how`."""
    dtype = parse_dtypes(args.dtype) if args.dtype else None
    return Setup(args.pipeline, _parallel(args), dtype, args.lora, args.whole, args.offload, data=1)


def _parallel(args: argparse.Namespace) -> dict[str, Any]:
    """Those for `port`. Absent ones are left out, since it has defaults of its own."""
    parallel = {
        "patches": args.patches,
        "warmup_steps": args.warmup,
        "kv_cache_dtype": args.kv_cache_dtype,
        "cache": args.cache,
        "trim_padding": args.trim_padding,
        "mode": args.mode,
        "compile": args.compile or None,
        "cuda_graph": args.cuda_graph or None,
        "machine": args.machine,
        "timeout": args.timeout,
    }
    parallel |= {name: getattr(args, name) for name in MESH_DIMS}
    return {name: value for name, value in parallel.items() if value is not None}


def _options(args: argparse.Namespace) -> dict[str, Any]:
    width, height = parse_size(args.size) if args.size else (None, None)
    same = ("embeddings", "image", "frames", "steps", "guidance", "seed", "lora", "device", "whole", "offload")
    return {
        **{name: getattr(args, name) for name in (*same, "data", "benchmark", "output", "fps")},
        **_parallel(args),
        "negative_prompt": args.negative,
        "width": width,
        "height": height,
        "dtype": parse_dtypes(args.dtype) if args.dtype else None,
        "arguments": dict(map(_argument, args.set)),
    }


def _argument(text: str) -> tuple[str, Any]:
    """A value is JSON, or else a text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise GenerationError(f"--set {text}: expected NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _show(generation: Generation, folder: Path) -> None:
    from rich.table import Table

    report = generation.report
    degrees = "".join(f", {name}={report['options'][name]}" for name in MESH_DIMS if report["options"][name] > 1)
    table = Table(title=f"{report['pipeline']}, {report['processes']} x {report['device']}{degrees}")
    for heading in ("phase", "seconds", "host GiB", "device GiB"):
        table.add_column(heading, justify="left" if heading == "phase" else "right")
    for phase, usage in report["phases"].items():
        device = f"{usage['device_gib']:.2f}" if usage["device_gib"] else "-"
        table.add_row(phase, f"{usage['seconds']:.2f}", f"{usage['host_gib']:.2f}", device)
    write(table)
    if "hosts" in report:
        print(report["hosts"])
    for name, part in report["parts"].items():
        shares = ", ".join(f"{share:.3f}" for share in part.get("shares", ()))
        print(f"{name}: {f'ranks do {shares} of the work' if shares else 'whole on every rank: ' + part['whole']}")
    for used in report.get("caches", ()):
        print(CacheUse(**used))
    for phase, seconds in report.get("benchmark", {}).get("seconds", {}).items():
        print(f"{phase}: median {seconds['median']:.3f} s, {seconds['min']:.3f} to {seconds['max']:.3f}")
    for path in generation.files:
        note = " (gif: nothing here writes mp4; pip install imageio imageio-ffmpeg)" if path.suffix == ".gif" else ""
        print(f"{path}{note}")
    print(folder / REPORT)
    sys.stdout.flush()
