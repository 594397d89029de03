"""`generate`: from a pipeline, or the folder of one, to images and videos, on all processes of a job."""

from __future__ import annotations

import importlib.util
import inspect
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from xdit_ir.errors import GenerationError, XditError
from xdit_ir.generation import files
from xdit_ir.generation.folder import Dtypes, checked_dtypes
from xdit_ir.generation.job import Job
from xdit_ir.generation.meter import Meter, summary, watching
from xdit_ir.generation.request import Request, UnfitRequest, check_numbers, check_seed, dealt, read_embeddings
from xdit_ir.generation.setup import Setup
from xdit_ir.ir.mesh import Mesh, check_degree_names
from xdit_ir.porting.components import ports
from xdit_ir.porting.port import port
from xdit_ir.porting.ported import Ported
from xdit_ir.porting.programs_of import ProgramsOf
from xdit_ir.transport.spread import told

NEEDED = ("diffusers", "transformers", "accelerate")
REPORT = "generate.json"


@dataclass
class Generation:
    """What was made: `results` has, for each prompt of this process's replica, a list of images (`PIL.Image`) or videos
    (lists of them); `files` are those that this process wrote, and `report` is what it writes as JSON."""

    pipe: Any
    job: Job
    results: list[list[Any]] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)

    def close(self) -> None:
        """End the job: CUDA graphs are freed, and torch.distributed ends, which would wait for them."""
        for ported in ports(self.pipe).values():
            ported.reset()
        if dist.is_initialized():
            dist.destroy_process_group()


def generate(
    pipe: Any,
    prompt: str | Sequence[str] | None = None,
    *,
    negative_prompt: str | None = None,
    embeddings: str | Path | Mapping[str, Any] | None = None,
    image: Any = None,
    width: int | None = None,
    height: int | None = None,
    frames: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    arguments: Mapping[str, Any] | None = None,
    lora: Sequence[str] = (),
    dtype: Dtypes | str = None,
    device: str | None = None,
    whole: bool = False,
    offload: bool = False,
    data: int = 1,
    benchmark: int = 0,
    output: str | Path | None = None,
    fps: int = files.FPS,
    **parallel: Any,
) -> Generation:
    """Generate one image or video per prompt; every process of a job (torchrun) calls it with the same arguments.

    Args:
        pipe: a diffusers pipeline, ported or not, the folder of one, or its name on the hub.
        prompt: one prompt or several, which are generated one after the other, all with the same `seed`.
        embeddings: instead: a safetensors file, or tensors, by the names of the pipeline's arguments.
        image: a file or a `PIL.Image` to start from.
        arguments: further arguments of the pipeline's call.
        lora: adapters, each a path or a hub name, with `:SCALE` if it is not 1.
        dtype: of all components, or by component (`default` for the others), or text such as 'bf16,vae=fp32'; also
            casts those of a given pipeline.
        device: "cuda" (LOCAL_RANK picks which; the default where there is one) or "cpu".
        whole: load denoisers with the pipeline instead of reading what each rank uses.
        offload: components wait in host memory while others run.
        data: replicas of the pipeline, each on processes of its own and with a share of the prompts.
        benchmark: generate the first prompt once to warm up, and so many times for `report["benchmark"]`.
        output: the folder for files, written by the first process of each replica, and for the report, by the first.
        fps: frames per second of videos.
        parallel: degrees and other options of `port`, which plans the degrees that are not given.

    Raises:
        XditError: of the kinds that `load`, `start`, `port` and `Request` name, before anything is generated where
            that is possible. GenerationError: the pipeline refuses its arguments.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise GenerationError(f"generate needs {', '.join(missing)}: pip install xdit-ir[zoo]")
    options = inspect.signature(port).parameters
    unknown = {name: given for name, given in parallel.items() if name not in options}
    check_degree_names(unknown, [*options, *inspect.signature(generate).parameters])
    prompts = (prompt,) if isinstance(prompt, str) else tuple(prompt or ())
    check_numbers(width=width, height=height, frames=frames, steps=steps, fps=fps, benchmark=benchmark or None)
    check_seed(seed)
    setup = Setup(pipe, parallel, checked_dtypes(dtype), lora, whole, offload, data)
    job = setup.start(prompts, device)
    if output is not None and job.leads:
        files.check_writable(Path(output))
    inputs = _embedded(embeddings), negative_prompt, _picture(image)
    request = Request(prompts, *inputs, width, height, frames, steps, guidance, seed, arguments or {})
    return _generated(setup, job, request, benchmark, output, fps)


def _generated(
    setup: Setup, job: Job, request: Request, benchmark: int, output: str | Path | None, fps: int
) -> Generation:
    """The share of this process's replica, generated and written."""
    places, meter = dealt(request.prompts, job.replica.index, job.replica.count), Meter(job.device)
    generation = Generation(setup.pipeline(job, meter), job)
    _run(generation, request.share(places), meter, benchmark)
    generation.report = _report(setup, generation, meter) | generation.report
    if output is not None and job.leads:
        _write(generation, Path(output), places, fps)
    return generation


def _embedded(embeddings: str | Path | Mapping[str, Any] | None) -> dict[str, Any]:
    return read_embeddings(embeddings) if isinstance(embeddings, (str, Path)) else dict(embeddings or {})


def _picture(image: Any) -> Any:
    import diffusers.utils

    if not isinstance(image, (str, Path)):
        return image
    try:
        return diffusers.utils.load_image(str(image))
    except (OSError, ValueError) as error:
        raise GenerationError(f"image {image} cannot be read: {error}") from error


def _run(generation: Generation, request: Request, meter: Meter, benchmark: int) -> None:
    calls = request.calls(generation.pipe)
    if not benchmark:
        generation.results = [called(generation.pipe, request, call, meter) for call in calls]
        return
    called(generation.pipe, request, calls[0], meter)
    clocks = [Meter(meter.device) for _ in range(benchmark)]
    for clock in clocks:
        generation.results = [called(generation.pipe, request, calls[0], clock)]
    runs = [clock.as_dict() for clock in clocks]
    generation.report = {"benchmark": {"runs": runs, "seconds": summary(runs)}}


def called(pipe: Any, request: Request, call: Mapping[str, Any], meter: Meter) -> list[Any]:
    """One call of the pipeline; its errors become ours."""
    with watching(pipe, meter) as watch:
        try:
            output = pipe(**call, **request.seeded(pipe))
        except XditError:
            raise
        except Exception as error:
            name = type(pipe).__name__
            if isinstance(error, ValueError) and not watch.denoising:
                raise UnfitRequest(f"{name} refuses its arguments: {error}") from error
            when = "decoding" if watch.decoding else "denoising" if watch.denoising else "before it denoises"
            raise GenerationError(f"{name} fails {when}: {type(error).__name__}: {error}") from error
        return files.results(output)


def _report(setup: Setup, generation: Generation, meter: Meter) -> dict[str, Any]:
    import diffusers

    job, device = generation.job, generation.job.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    ported = [one for one in ports(generation.pipe).values() if isinstance(one, Ported)]
    mesh = ported[0]._xdit_specialisations.mesh if ported else Mesh.of(**setup.degrees)
    spread = told(mesh, job.hosts)
    caches = [vars(used) for one in ported if (used := one._xdit_specialisations.cache) is not None]
    return {
        "pipeline": type(generation.pipe).__name__,
        "source": str(setup.source) if setup.is_folder else None,
        "options": {**{key: one for key, one in setup.options.items() if one not in (None, False)}, **mesh.degrees},
        "data": job.replica.count,
        "processes": job.replica.size * job.replica.count,
        "device": name,
        "weights": "read by each rank" if any(one._holds for one in ported) else "loaded whole",
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "phases": meter.as_dict(),
        "parts": parts_of(generation.pipe),
    } | {name: what for name, what in {"hosts": spread, "caches": caches}.items() if what}


def parts_of(pipe: Any) -> dict[str, dict[str, Any]]:
    """How the last call of everything ran that is ported of a pipeline, by name; without what was not called."""
    return {name: part for name, port in ports(pipe).items() if (part := _part(port))}


def _part(port: ProgramsOf) -> dict[str, Any]:
    """How the last call of what is ported ran, and what each rank did of its work; nothing if it was not called."""
    if whole := port._xdit_made.whole:
        return {"whole": whole}
    if port.program is None:
        return {}
    report = port.report()
    shares = [round(flops / max(report.flops_total, 1), 4) for flops in report.flops_per_rank]
    return {"shares": shares, "execution": report.execution}


def _write(generation: Generation, folder: Path, places: Sequence[int], fps: int) -> None:
    """Write files, elsewhere if that fails: what was generated is not lost."""
    try:
        _write_to(generation, folder, places, fps)
    except (OSError, ValueError, RuntimeError) as error:
        generation.files, elsewhere = [], Path(tempfile.mkdtemp(prefix="generated-"))
        _write_to(generation, elsewhere, places, fps)
        raise GenerationError(f"cannot write to {folder}: {error}; what was generated is in {elsewhere}") from error


def _write_to(generation: Generation, folder: Path, places: Sequence[int], fps: int) -> None:
    for place, items in zip(places, generation.results, strict=False):
        generation.files += files.write(items, folder, place, fps)
    generation.report["files"] = [path.name for path in generation.files]
    if generation.job.reports:
        (folder / REPORT).write_text(json.dumps(generation.report, indent=1, default=vars) + "\n")
