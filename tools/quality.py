"""What PipeFusion and step caches do to images, measured on the trained digits model: one process, exact semantics.

    python -m xdit_ir.tools.quality --output benchmarks/quality/digits.json --page docs/quality.md

Every image is made by the unmodified `DiTPipeline`, whose transformer runs its stages and patches as
`simulate_steps` does, or with a step cache. The same latents, classes and guidance are used everywhere.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from torch import nn

import xdit_ir as xir
from xdit_ir import capture
from xdit_ir.api import ParallelProgram, TracedProgram
from xdit_ir.ir.difference import relative_error
from xdit_ir.ir.interpret import model_state
from xdit_ir.models import digits
from xdit_ir.simulation.steps import PipelineSimulation
from xdit_ir.tools import quality_page
from xdit_ir.tools.terminal import progress_bar

GUIDANCE, STAGES, SEED = 2.0, 2, 0
# Denoising steps, patches and warmup steps; one of the three varies about (20, 4, 1).
SETTINGS = (
    *((20, patches, 1) for patches in (1, 2, 4, 8, 16)),
    *((20, 4, warmup) for warmup in (2, 4, 8)),
    *((steps, 4, 1) for steps in (5, 10, 50)),
)
# Denoising steps, and what `cache` of `port` is.
CACHES = (
    *((20, f"first-block:{threshold}") for threshold in (0.05, 0.1, 0.2, 0.4)),
    *((20, f"every:{often}") for often in (2, 3, 4)),
    *((20, f"steps:{steps}") for steps in ("0,1,2,4,7,10,13,16", "0,4,8,12,14,16,18,19")),  # early ones, or late ones
)


# What `kv_cache_dtype` of `parallelize` is; the first is the model's own.
DTYPES = ("auto", "bfloat16", "fp8_e4m3")


@dataclass(frozen=True)
class DtypeQuality:
    """Images of one `kv_cache_dtype` under PipeFusion: MiB of a rank's buffers for all images; relative difference to
    the exact ones, and to those of the model's own dtype; and the share whose digit is recognised."""

    steps: int
    patches: int
    dtype: str
    mib: float
    difference: float
    rounding: float
    accuracy: float


@dataclass(frozen=True)
class CacheQuality:
    """Images of one step cache, as in `Quality`; `skipped` steps left blocks out."""

    steps: int
    cache: str
    skipped: int
    difference: float
    largest: float
    accuracy: float
    exact_accuracy: float


@dataclass(frozen=True)
class Quality:
    """Images of one setting: relative difference to the exact ones, and the share whose digit is recognised."""

    steps: int
    patches: int
    warmup_steps: int
    difference: float
    largest: float
    accuracy: float
    exact_accuracy: float


class Staged(nn.Module):
    """The pipeline's transformer, run as stages over patches in this process; one instance for one batch of images."""

    def __init__(self, model: nn.Module, program: ParallelProgram, device: torch.device) -> None:
        super().__init__()
        assert program.pipeline is not None
        self.model, self.program = model, program
        self.config: Any = model.config
        self.dtype, self.device = torch.float32, device
        self.request = PipelineSimulation(program.pipeline, model_state(program.original, model), device)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The next step of the request: the output of the first rank (all ranks have the same)."""
        inputs = capture.bind_inputs(self.model, self.program.original, args, kwargs)
        return capture.build_output(self.program.original.signature, self.request.step(inputs)[0])


def make(pipe: Any, labels: torch.Tensor, steps: int) -> torch.Tensor:
    """Images [N, 1, 64, 64] of these digits, the same for the same transformer."""
    generator = torch.Generator("cpu").manual_seed(SEED)
    images: torch.Tensor = pipe(
        labels.tolist(), guidance_scale=GUIDANCE, num_inference_steps=steps, output_type="pt", generator=generator
    ).images
    return images.cpu()


def measure(count: int, settings: Sequence[tuple[int, int, int]], device: torch.device) -> list[Quality]:
    """Every setting with `count` images, a tenth of each digit."""
    pipe: Any = digits.load_pipeline().to(device)
    model, classifier = pipe.transformer, digits.load_classifier()
    labels = torch.arange(count) % 10
    traced = _traced(model, labels, device)
    exact = {steps: make(pipe, labels, steps) for steps in {steps for steps, _, _ in settings}}
    found = []
    with progress_bar() as bar:
        task = bar.add_task("quality", total=len(settings))
        for steps, patches, warmup in settings:
            program = traced.parallelize(pipefusion=STAGES, patches=patches, warmup_steps=warmup)
            pipe.transformer = Staged(model, program, device)
            images = make(pipe, labels, steps)
            found.append(
                Quality(
                    steps,
                    patches,
                    warmup,
                    relative_error([images], [exact[steps]]),
                    (images - exact[steps]).abs().max().item(),
                    classifier.accuracy(images, labels),
                    classifier.accuracy(exact[steps], labels),
                )
            )
            bar.advance(task)
    return found


def measure_caches(count: int, settings: Sequence[tuple[int, str]], device: torch.device) -> list[CacheQuality]:
    """Every step cache with `count` images, a tenth of each digit."""
    pipe: Any = digits.load_pipeline().to(device)
    model, classifier, labels = pipe.transformer, digits.load_classifier(), torch.arange(count) % 10
    exact = {steps: make(pipe, labels, steps) for steps in {steps for steps, _ in settings}}
    found = []
    for steps, rule in settings:
        pipe.transformer = xir.port(model, ulysses=1, cache=rule)
        images, want = make(pipe, labels, steps), exact[steps]
        used = pipe.transformer.report().cache
        assert used is not None
        rates = classifier.accuracy(images, labels), classifier.accuracy(want, labels)
        difference, largest = relative_error([images], [want]), (images - want).abs().max().item()
        found.append(CacheQuality(steps, rule, used.skipped, difference, largest, *rates))
    return found


def measure_dtypes(count: int, dtypes: Sequence[str], device: torch.device) -> list[DtypeQuality]:
    """Every dtype of stale keys and values with `count` images, a tenth of each digit."""
    pipe: Any = digits.load_pipeline().to(device)
    model, classifier, labels = pipe.transformer, digits.load_classifier(), torch.arange(count) % 10
    steps, patches = quality_page.CENTRE["steps"], quality_page.CENTRE["patches"]
    traced, exact, found = _traced(model, labels, device), make(pipe, labels, steps), list[DtypeQuality]()
    own = exact
    for dtype in dtypes:
        program = traced.parallelize(pipefusion=STAGES, patches=patches, kv_cache_dtype=dtype)
        pipe.transformer = Staged(model, program, device)
        images, mib = make(pipe, labels, steps), max(program.report().buffer_bytes_per_rank) / 2**20
        own = images if not found else own
        differences = relative_error([images], [exact]), relative_error([images], [own])
        found.append(DtypeQuality(steps, patches, dtype, mib, *differences, classifier.accuracy(images, labels)))
    return found


def _traced(model: Any, labels: torch.Tensor, device: torch.device) -> TracedProgram:
    """The transformer, captured as the pipeline calls it."""
    size, batch = model.config.sample_size, 2 * len(labels)
    example = {
        "hidden_states": torch.zeros(batch, model.config.in_channels, size, size, device=device),
        "timestep": torch.zeros(batch, dtype=torch.int64, device=device),
        "class_labels": torch.zeros(batch, dtype=torch.int64, device=device),
    }
    return xir.trace(model, example)


def document(found: Sequence[Quality], count: int, device: str) -> dict[str, Any]:
    """What is written as JSON."""
    return {
        "images": count,
        "device": device,
        "guidance": GUIDANCE,
        "stages": STAGES,
        "results": [asdict(one) for one in found],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the JSON; with `--page`, the page and its plots (alone with `--from` a JSON)."""
    parser = argparse.ArgumentParser(prog="xdit_ir.tools.quality", description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=1000, help="per setting (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("build/quality.json"), help="(default: %(default)s)")
    parser.add_argument("--from", dest="source", type=Path, help="a JSON of an earlier run: measure nothing")
    parser.add_argument("--caches", action="store_true", help="with --from: measure step caches alone, and add them")
    parser.add_argument("--dtypes", action="store_true", help="the same for dtypes of stale keys and values")
    parser.add_argument("--page", type=Path, help="write this page, and its plot beside it")
    args = parser.parse_args(argv)
    logging.disable_progress_bar()
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    result: dict[str, Any] = {} if args.source is None else json.loads(args.source.read_text())
    if args.source is None:
        result = document(measure(args.images, SETTINGS, device), args.images, name)
    if args.source is None or args.caches:
        caches = [asdict(one) for one in measure_caches(args.images, CACHES, device)]
        result["caches"] = {"images": args.images, "device": name, "results": caches}
    if args.source is None or args.dtypes:
        dtypes = [asdict(one) for one in measure_dtypes(args.images, DTYPES, device)]
        result["dtypes"] = {"images": args.images, "device": name, "results": dtypes}
    if args.source is None or args.caches or args.dtypes:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(quality_page.table(result))
    if args.page is not None:
        quality_page.write(result, args.page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
