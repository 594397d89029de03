"""`generate`: from a pipeline, or the folder of one, to images and videos, on all processes of a job."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from xdit_ir.errors import GenerationError
from xdit_ir.generation import files
from xdit_ir.generation.folder import Dtypes, check_dtypes, load
from xdit_ir.generation.job import Job, start
from xdit_ir.generation.meter import Meter, summary, watching
from xdit_ir.generation.request import Request, dealt, read_embeddings
from xdit_ir.ir.mesh import MESH_DIMS, Mesh
from xdit_ir.porting.denoisers import components
from xdit_ir.porting.port import port
from xdit_ir.porting.ported import Ported

NEEDED = ("diffusers", "transformers", "accelerate")
REPORT = "generate.json"


@dataclass
class Generation:
    """What was made: `results` has, for each prompt of this process's group, a list of images (`PIL.Image`) or videos
    (lists of them); `files` are those that this process wrote, and `report` is what it writes as JSON."""

    pipe: Any
    job: Job
    results: list[list[Any]] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)

    def close(self) -> None:
        """End the job: CUDA graphs are freed, and torch.distributed ends, which would wait for them."""
        for component in _ported(self.pipe):
            component.reset()
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
    dtype: Dtypes = None,
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
        dtype: of all components, or by component (`default` for the others); also casts those of a given pipeline.
        device: "cuda" (LOCAL_RANK picks which; the default where there is one) or "cpu".
        whole: load denoisers with the pipeline instead of reading what each rank uses.
        offload: components wait in host memory while others run.
        data: groups of processes, each with a copy of the pipeline and a share of the prompts.
        benchmark: generate the first prompt once to warm up, and so many times for `report["benchmark"]`.
        output: the folder for files, written by the first process of each group, and for the report, by the first.
        fps: frames per second of videos.
        parallel: degrees and other options of `port`.

    Raises:
        XditError: of the kinds that `load`, `start`, `port` and `Request` name, before anything is generated where
            that is possible. GenerationError: the pipeline refuses its arguments.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise GenerationError(f"generate needs {', '.join(missing)}: pip install xdit-ir[zoo]")
    prompts = (prompt,) if isinstance(prompt, str) else tuple(prompt or ())
    degrees = {name: parallel.get(name, 1) for name in MESH_DIMS}
    dealt(prompts, 0, data)
    made = not isinstance(pipe, (str, Path)) and bool(_ported(pipe))
    job = start(None if made else Mesh.of(**degrees), data, device)
    _quiet(job)
    embedded = read_embeddings(embeddings) if isinstance(embeddings, (str, Path)) else dict(embeddings or {})
    picture = _picture(image)
    mine = [prompts[place] for place in dealt(prompts, job.group, data)] if prompts else []
    request = Request(
        tuple(mine), embedded, negative_prompt, picture, width, height, frames, steps, guidance, seed, arguments or {}
    )
    meter = Meter(job.device)
    whole = whole or bool(lora) or offload or (job.device.type == "cpu" and torch.cuda.is_available())
    ready = _prepared(pipe, job, meter, parallel, dtype, lora, whole=whole, offload=offload)
    ready.set_progress_bar_config(disable=not job.reports)
    generation = Generation(ready, job)
    _run(generation, request, meter, benchmark)
    generation.report = _report(pipe, generation, meter, degrees, parallel) | generation.report
    if output is not None and job.leads:
        _write(generation, Path(output), dealt(prompts, job.group, data), fps)
    return generation


def _ported(pipe: Any) -> list[Ported]:
    return [component for component in components(pipe).values() if type(component) is Ported]


def _quiet(job: Job) -> None:
    """Only the first process shows how loading goes on."""
    import diffusers.utils.logging
    import transformers.utils.logging

    if not job.reports:
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        diffusers.utils.logging.set_verbosity_error()
        transformers.utils.logging.set_verbosity_error()


def _picture(image: Any) -> Any:
    import diffusers.utils

    if not isinstance(image, (str, Path)):
        return image
    try:
        return diffusers.utils.load_image(str(image))
    except (OSError, ValueError) as error:
        raise GenerationError(f"image {image} cannot be read: {error}") from error


def _prepared(
    pipe: Any,
    job: Job,
    meter: Meter,
    options: Mapping[str, Any],
    dtype: Dtypes,
    lora: Sequence[str],
    *,
    whole: bool,
    offload: bool,
) -> Any:
    """The pipeline, loaded, with its adapters, ported, and where it runs."""
    weights = None
    if isinstance(pipe, (str, Path)):
        loaded = load(pipe, dtype, whole=whole)
        pipe, weights = loaded.pipe, loaded.weights
    else:
        _cast(pipe, dtype)
        check_dtypes(pipe, dtype)
    _adapt(pipe, lora)
    meter.end("load")
    if options or not _ported(pipe):
        port(pipe, **{"weights": weights, **options})
    if offload:
        pipe.enable_model_cpu_offload(device=job.device)
    else:
        pipe.to(job.device)
    meter.end("port")
    return pipe


def _cast(pipe: Any, dtype: Dtypes) -> None:
    for name, module in components(pipe).items():
        wanted = dtype.get(name, dtype.get("default")) if isinstance(dtype, Mapping) else dtype
        if wanted is not None:
            module.to(wanted)


def _adapt(pipe: Any, lora: Sequence[str]) -> None:
    scales = {}
    for place, text in enumerate(lora):
        path, colon, scale = text.rpartition(":")
        name = f"lora{place}"
        try:
            scales[name] = float(scale) if colon else 1.0
        except ValueError:
            path, scales[name] = text, 1.0
        try:
            pipe.load_lora_weights(path if colon and path else text, adapter_name=name)
        except (OSError, ValueError, AttributeError) as error:
            raise GenerationError(f"lora {text} cannot be loaded into {type(pipe).__name__}: {error}") from error
    if scales:
        pipe.set_adapters(list(scales), list(scales.values()))


def _run(generation: Generation, request: Request, meter: Meter, benchmark: int) -> None:
    calls = request.calls(generation.pipe)
    if not benchmark:
        generation.results = [_call(generation.pipe, request, call, meter) for call in calls]
        return
    _call(generation.pipe, request, calls[0], meter)
    clocks = [Meter(meter.device) for _ in range(benchmark)]
    for clock in clocks:
        generation.results = [_call(generation.pipe, request, calls[0], clock)]
    runs = [clock.as_dict() for clock in clocks]
    generation.report = {"benchmark": {"runs": runs, "seconds": summary(runs)}}


def _call(pipe: Any, request: Request, call: Mapping[str, Any], meter: Meter) -> list[Any]:
    """One call of the pipeline; what it refuses before it begins to denoise becomes one of our errors."""
    with watching(pipe, meter) as watch:
        try:
            output = pipe(**call, **request.seeded(pipe))
        except ValueError as error:
            if watch.denoising:
                raise
            raise GenerationError(f"{type(pipe).__name__} refuses its arguments: {error}") from error
        return files.results(output)


def _report(
    source: Any, generation: Generation, meter: Meter, degrees: Mapping[str, int], parallel: Mapping[str, Any]
) -> dict[str, Any]:
    import diffusers

    job, device = generation.job, generation.job.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "pipeline": type(generation.pipe).__name__,
        "source": str(source) if isinstance(source, (str, Path)) else None,
        "options": {**degrees, **{key: value for key, value in parallel.items() if value not in (None, False)}},
        "data": job.groups,
        "processes": job.processes * job.groups,
        "device": name,
        "weights": "read by each rank" if any(one._holds for one in _ported(generation.pipe)) else "loaded whole",
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "phases": meter.as_dict(),
    }


def _write(generation: Generation, folder: Path, places: Sequence[int], fps: int) -> None:
    for place, items in zip(places, generation.results, strict=False):
        generation.files += files.write(items, folder, place, fps)
    generation.report["files"] = [path.name for path in generation.files]
    if generation.job.reports:
        (folder / REPORT).write_text(json.dumps(generation.report, indent=1, default=vars) + "\n")
