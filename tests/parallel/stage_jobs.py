"""Jobs about PipeFusion: what every rank does; each returns plain data for the test to judge."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import diffusers
import pipelines
import torch
import torch.distributed as dist
from jobs import Degrees, _plain, relative_error
from torch import nn
from torch.utils import _pytree as pytree

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.capture.inputs import bind_arguments, bind_inputs
from xdit_ir.capture.outputs import build_output
from xdit_ir.interpret import model_state
from xdit_ir.runtime.deferred import Deferred, force
from xdit_ir.runtime.execution import plain_modes
from xdit_ir.runtime.shadow import Shadow
from xdit_ir.simulate_steps import PipelineSimulation

LATENTS = "hidden_states"


def _inputs(example: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    """Other latents and timesteps at every step, as in denoising."""
    make = torch.Generator().manual_seed(7)
    found = [example]
    for _ in range(steps - 1):
        last = found[-1]
        noise = torch.randn(last[LATENTS].shape, generator=make)
        time = last["timestep"] * 0.9 if last["timestep"].is_floating_point() else last["timestep"] - 40
        found.append(last | {LATENTS: last[LATENTS] + 0.3 * noise, "timestep": time})
    return found


def _tensor(output: Any) -> torch.Tensor:
    [found] = [leaf for leaf in pytree.tree_leaves(_plain(output)) if isinstance(leaf, torch.Tensor)]
    return found


def _following(latents: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """These latents, made from an output of the model."""
    for dim, size in enumerate(latents.shape):
        output = output.narrow(dim, 0, size)
    return latents + 0 * output


@torch.no_grad()
def _run(module: Callable[..., Any], inputs: list[dict[str, Any]]) -> list[Any]:
    """The outputs of consecutive steps of one request, read only at the end."""
    outputs: list[Any] = []
    for given in inputs:
        latents = _following(given[LATENTS], _tensor(outputs[-1])) if outputs else given[LATENTS]
        outputs.append(module(**given | {LATENTS: latents}))
    return outputs


def emitted_steps(name: str, degree_sets: list[Degrees], steps: int = 4) -> list[dict[str, Any]]:
    """Per set of degrees: the error of every step against the simulation, and how far the last step is from exact."""
    torch.set_num_threads(1)
    model, example = models.load(f"{name}:tiny")
    inputs, traced, found = _inputs(example, steps), xir.trace(model, example), []
    with torch.no_grad():
        exact = model(**inputs[-1])
    for degrees in degree_sets:
        parallel = traced.parallelize(**degrees)
        want = parallel.simulate_steps(model, inputs)
        got = _run(parallel.emit(model), inputs)
        errors = [relative_error(mine, step[dist.get_rank()]) for mine, step in zip(got, want, strict=True)]
        deferred = all(isinstance(_tensor(output), Deferred) for output in got)
        found.append({"errors": errors, "stale": relative_error(got[-1], exact), "deferred": deferred})
    return found


class Simulated(Shadow):
    """A model whose consecutive calls are the steps of one simulated request; `lanes` calls make a step."""

    def __init__(self, original: nn.Module, lanes: int, **degrees: Any) -> None:
        super().__init__(original)
        self.__dict__["_state"] = {"lanes": lanes, "degrees": degrees, "runs": [], "calls": 0}

    def _xdit_forward(self, /, *args: Any, **kwargs: Any) -> Any:
        state, model = self.__dict__["_state"], self._xdit_original
        example = bind_arguments(self._xdit_signature, args, kwargs, xir.MismatchError)
        if "program" not in state:
            state["program"] = xir.trace(model, example).parallelize(**state["degrees"])
        program = state["program"].original
        if len(state["runs"]) < state["lanes"]:
            weights = model_state(program, model)
            state["runs"].append(PipelineSimulation(state["program"].pipeline, weights, torch.device("cpu")))
        run = state["runs"][state["calls"] % state["lanes"]]
        state["calls"] += 1
        with plain_modes(torch.device("cpu")):
            outputs = run.step(bind_inputs(model, program, (), example))[0]
        return build_output(program.signature, outputs)


SCHEDULERS = {
    "euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "dpm": lambda: diffusers.DPMSolverMultistepScheduler(algorithm_type="dpmsolver++"),
    "unipc": lambda: diffusers.UniPCMultistepScheduler(),
    "ddim": lambda: diffusers.DDIMScheduler(clip_sample=False),
    "ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(),
}


def images(cases: list[dict[str, Any]], steps: int = 8) -> list[dict[str, Any]]:
    """Per case: how far the latents that an unmodified pipeline ends with are from those of the simulation, and from
    those of the model itself. A case names a pipeline, degrees, and maybe a scheduler and modes."""
    torch.set_num_threads(1)
    return [_image(steps=steps, **case) for case in cases]


def _image(
    pipeline: str, degrees: Degrees, steps: int, scheduler: str = "", lanes: int = 1, modes: tuple[str, ...] = ()
) -> dict[str, Any]:
    pipe, call = pipelines.BUILDERS[pipeline]()
    if scheduler:
        pipe.scheduler = SCHEDULERS[scheduler]()
    pipe.set_progress_bar_config(disable=True)
    original = pipe.transformer

    def run(module: nn.Module) -> torch.Tensor:
        pipe.transformer = module
        with contextlib.ExitStack() as entered:
            entered.enter_context(torch.inference_mode() if "inference" in modes else torch.no_grad())
            if "autocast" in modes:
                entered.enter_context(torch.autocast("cpu", torch.bfloat16))
            result = pipe(num_inference_steps=steps, generator=torch.Generator().manual_seed(0), **call)
        [latents] = [leaf for leaf in pytree.tree_leaves(_plain(result)) if isinstance(leaf, torch.Tensor)]
        return force(latents).float()

    exact = run(original)
    want = run(Simulated(original, lanes, **degrees))
    ported = xir.port(original, **degrees)
    got, again = run(ported), run(ported)
    scale = exact.norm()
    return {
        "error": ((got - want).norm() / scale).item(),
        "again": ((again - want).norm() / scale).item(),
        "stale": ((got - exact).norm() / scale).item(),
        "programs": len(ported.programs),
    }
