"""The pipeline of a generation: loaded, with its adapters, ported, and where it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from xdit_ir.emission.execution import Execution
from xdit_ir.errors import GenerationError, ParallelizeError
from xdit_ir.generation.folder import Dtypes, check_dtypes, load
from xdit_ir.generation.job import Job, choose_device, start
from xdit_ir.generation.meter import Meter
from xdit_ir.generation.request import dealt
from xdit_ir.ir.mesh import MESH_DIMS
from xdit_ir.porting.components import ports
from xdit_ir.porting.denoisers import components
from xdit_ir.porting.planned import mesh_of_job
from xdit_ir.porting.port import port
from xdit_ir.porting.replicas import replica


@dataclass(frozen=True)
class Setup:
    """What `generate` was given for it; `source` is a pipeline, or the folder or name of one, and `options` those of
    `port`."""

    source: Any
    options: Mapping[str, Any]
    dtype: Dtypes
    lora: Sequence[str]
    whole: bool
    offload: bool
    data: int

    @property
    def is_folder(self) -> bool:
        """Whether the pipeline is loaded."""
        return isinstance(self.source, (str, Path))

    @property
    def degrees(self) -> dict[str, int]:
        """Those that are given."""
        return {name: self.options[name] for name in MESH_DIMS if name in self.options}

    def start(self, prompts: Sequence[str], device: str | None) -> Job:
        """The job of this process; raises where its size, the degrees or the number of prompts do not fit."""
        dealt(prompts, 0, self.data)
        if not self.is_folder and ports(self.source):
            job = Job(choose_device(device), replica(self.source))
            if self.data not in (1, job.replica.count):
                raise ParallelizeError(f"data={self.data}, but the pipeline was ported with data={job.replica.count}")
        else:
            limit = Execution(timeout=self.options.get("timeout")).limit
            mesh, planned = mesh_of_job(self.degrees, self.data)
            job = start(mesh, self.data, device, limit, planned=planned)
        if not job.reports:
            _quieten()
        return job

    def pipeline(self, job: Job, meter: Meter) -> Any:
        """The pipeline, ready to be called; `meter` times its phases."""
        pipe, weights = self._loaded(job)
        _adapt(pipe, self.lora)
        meter.end("load")
        if self.options or not ports(pipe):
            port(pipe, **{"weights": weights, "data": self.data, **self.options})
        if self.offload:
            pipe.enable_model_cpu_offload(device=job.device)
        else:
            pipe.to(job.device)
        meter.end("port")
        pipe.set_progress_bar_config(disable=not job.reports)
        return pipe

    def _loaded(self, job: Job) -> tuple[Any, Any]:
        """The pipeline, and where each rank reads the weights of its denoisers, if it does."""
        if self.is_folder:
            on_host = self.offload or (job.device.type == "cpu" and torch.cuda.is_available())
            loaded = load(self.source, self.dtype, whole=self.whole or bool(self.lora) or on_host)
            return loaded.pipe, loaded.weights
        _cast(self.source, self.dtype)
        check_dtypes(self.source, self.dtype)
        return self.source, None


def _quieten() -> None:
    """Say nothing of how loading goes on: the first process does."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()


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
