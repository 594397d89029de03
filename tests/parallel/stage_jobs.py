"""Jobs about PipeFusion: what every rank does; each returns plain data for the test to judge."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any
from unittest import mock

import diffusers
import pipelines
import torch
import torch.distributed as dist
from jobs import Degrees, _failure, _load, _plain, relative_error
from torch import nn
from torch.utils import _pytree as pytree

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.capture.binder import bind_inputs
from xdit_ir.capture.effects import copied
from xdit_ir.capture.inputs import bind_arguments
from xdit_ir.capture.outputs import build_output
from xdit_ir.deferral.deferred import Deferred, materialize
from xdit_ir.emission.execution import plain_modes
from xdit_ir.ir import difference
from xdit_ir.ir.difference import tensors_of
from xdit_ir.ir.graphs import placeholders
from xdit_ir.ir.interpret import model_state
from xdit_ir.pipefusion.patch_cut import PatchCut
from xdit_ir.pipefusion.rank_tasks import RankTasks
from xdit_ir.runtime.shadow import Shadow
from xdit_ir.simulation.steps import PipelineSimulation

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
    [found] = tensors_of(_plain(output))
    return found


def _following(latents: torch.Tensor, output: torch.Tensor, cut: PatchCut | None = None) -> torch.Tensor:
    """These latents, made from an output of the model: from where that has their rows."""
    for dim, size in enumerate(latents.shape):
        output = output.narrow(dim, cut.shift if cut is not None and cut.dim == dim else 0, size)
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
    """A model whose consecutive calls are the steps of one simulated request; `lanes` calls make a step. Where an input
    is of another type than in the step before, a request begins."""

    def __init__(self, original: nn.Module, lanes: int, **degrees: Any) -> None:
        super().__init__(original)
        self.__dict__["_state"] = {"lanes": lanes, "degrees": degrees, "calls": 0, "types": None}

    def _xdit_forward(self, /, *args: Any, **kwargs: Any) -> Any:
        state, model = self.__dict__["_state"], self._xdit_original
        example = bind_arguments(self._xdit_signature, args, kwargs, xir.MismatchError)
        types = [leaf.dtype for leaf in pytree.tree_leaves(example) if isinstance(leaf, torch.Tensor)]
        if types != state["types"]:
            state |= {"types": types, "program": xir.trace(model, example).parallelize(**state["degrees"]), "runs": []}
        program = state["program"].original
        if len(state["runs"]) < state["lanes"]:
            weights = model_state(program, model)
            state["runs"].append(PipelineSimulation(state["program"].pipeline, weights, torch.device("cpu")))
        run = state["runs"][state["calls"] % state["lanes"]]
        state["calls"] += 1
        with plain_modes("cpu"):
            outputs = run.step(bind_inputs(model, program, (), example))[0]
        return build_output(program.signature, outputs)


@torch.no_grad()
def causal_video(chunks: int, steps: int) -> dict[str, Any]:
    """Chunks of a causal video, each denoised in several calls and then left in the cache by one more. `caches`: the
    error of what that left, against the model on the same latents; `note`: what it wrote beside; `given`: whether the
    caches that were returned are those that were given; `deferred`: how many calls waited for nothing."""
    model, example = models.load("kind-causal-video:tiny")
    port, found = xir.port(model, pipefusion=2, patches=2), {"caches": [], "note": [], "given": True, "deferred": 0}
    ours, its = copied(example["cache"]), copied(example["cache"])
    for chunk in range(chunks):
        x = torch.randn(example["x"].shape, generator=torch.Generator().manual_seed(chunk))
        for _ in range(steps):
            velocity, returned = port(x=x, cache=ours, note={}, chunk=chunk, write=False)
            found["given"] &= all(a is b for a, b in zip(tensors_of(returned), tensors_of(ours), strict=True))
            found["deferred"] += isinstance(velocity, Deferred)
            x = x - 0.1 * velocity
        note: dict[str, int] = {}
        port(x=x, cache=ours, note=note, chunk=chunk, write=True)
        model(x=_plain(x), cache=its, note={}, chunk=chunk, write=True)
        found["caches"].append(relative_error(ours, its))
        found["note"].append(note["cached"])
    return found


SCHEDULERS = {
    "euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "dpm": lambda: diffusers.DPMSolverMultistepScheduler(algorithm_type="dpmsolver++"),
    "unipc": lambda: diffusers.UniPCMultistepScheduler(),
    "ddim": lambda: diffusers.DDIMScheduler(clip_sample=False),
    "ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(),
}


def images(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per case: how far the latents that an unmodified pipeline ends with are from those of the simulation, and from
    those of the model itself. A case names a pipeline, degrees, and maybe a scheduler and modes."""
    torch.set_num_threads(1)
    return [_image(**case) for case in cases]


def _image(
    pipeline: str, degrees: Degrees, steps: int = 8, scheduler: str = "", lanes: int = 1, modes: tuple[str, ...] = ()
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
        [latents] = tensors_of(_plain(result))
        return materialize(latents).float()

    exact = run(original)
    want = run(Simulated(original, lanes, **{name: n for name, n in degrees.items() if lanes == 1 or name != "cfg"}))
    ported, passes = xir.port(original, **degrees), set[int]()
    got = run(ported)
    ported._xdit_specialisations.factory.queue.observe = lambda number, item: passes.add(number)
    again = run(ported)
    scale = exact.norm()
    return {
        "error": ((got - want).norm() / scale).item(),
        "again": ((again - want).norm() / scale).item(),
        "stale": ((got - exact).norm() / scale).item(),
        "programs": len(ported.programs),
        "passes": len(passes),
    }


def _queue(module: Any) -> Any:
    return module._xdit_runner.queue


def counted_sends(name: str, degrees: Degrees, steps: int) -> dict[str, Any]:
    """The messages that this rank sent over each boundary, and back to all, for one image."""
    torch.set_num_threads(1)
    model, example = models.load(f"{name}:tiny")
    module = xir.trace(model, example).parallelize(**degrees).emit(model)
    _run(module, _inputs(example, steps))
    channels = module._xdit_runner.channels
    mine = [channel for channel in channels.between if channel is not None and channel.sent]
    return {"forward": [channel.sent for channel in mine], "back": channels.returns[0].sent}


def overlapping_steps(name: str, degrees: Degrees, steps: int) -> dict[str, Any]:
    """The last stage does not run the last patch of a step before the first stage has begun the next step: if steps
    did not overlap, this would never end. Also the order in which this rank ran patches."""
    torch.set_num_threads(1)
    model, example = models.load(f"{name}:tiny")
    parallel = xir.trace(model, example).parallelize(**degrees)
    module = parallel.emit(model)
    store: Any = dist.distributed_c10d._get_default_store()
    last, patches = parallel.pipeline.stages - 1, parallel.pipeline.patches
    trace: list[list[Any]] = []

    def observe(number: int, item: Any) -> None:
        if item.stage == 0:
            trace.append([number, item.stage, item.patch, time.monotonic()])
            if item.patch == 0:
                store.set(f"{name} began {number}", "")
            return
        if item.stage == last and item.patch == patches - 1 and number < steps:
            store.wait([f"{name} began {number + 1}"], timedelta(seconds=100))
        trace.append([number, item.stage, item.patch, time.monotonic()])

    _queue(module).observe = observe
    inputs = _inputs(example, steps)
    outputs = _run(module, inputs)
    want = parallel.simulate_steps(model, inputs)
    return {"trace": trace, "error": relative_error(outputs[-1], want[-1][0])}


def interrupted(name: str, degrees: Degrees) -> dict[str, Any]:
    """A run that ends with an exception between steps, then one that ends inside a step, then a whole one; a read on
    one rank only."""
    torch.set_num_threads(1)
    model, example = models.load(f"{name}:tiny")
    parallel = xir.trace(model, example).parallelize(**degrees)
    module, inputs = parallel.emit(model), _inputs(example, 4)
    want = parallel.simulate_steps(model, inputs)

    def failing(number: int, item: Any) -> None:
        if item.patch == 1:
            raise ArithmeticError("in the middle")

    def reading(**given: Any) -> Any:
        output = module(**given)
        if dist.get_rank() == 0:
            _tensor(output).sum().item()
        return output

    _run(module, inputs[:3])
    failures = []
    for _ in range(2):
        _queue(module).observe = failing
        failures.append(_failure(lambda: _run(module, inputs))["error"])
        _run(module, inputs[:1])  # whatever a rank failed in is made anew
    errors = []
    for run in (module, reading):
        got = _run(run, inputs)
        errors += [relative_error(mine, step[0]) for mine, step in zip(got, want, strict=True)]
    return {"failures": failures, "errors": errors}


def plain_latents(name: str, degrees: Degrees) -> dict[str, Any]:
    """Latents that are not made from the last output begin a request: each call is exact. So are latents that are made
    from it with other positions, or from an older one."""
    model, example, want = _load(name)
    module = xir.trace(model, example).parallelize(**degrees).emit(model)
    other = example | {LATENTS: example[LATENTS].flip(1) + 0.1}
    with torch.no_grad():
        exact = model(**other)
        errors = [relative_error(module(**example), want), relative_error(module(**other), exact)]
        first = _tensor(module(**example))
        module(**example | {LATENTS: _following(example[LATENTS] + 1, first)})
        again = module(**other | {LATENTS: _following(other[LATENTS], first)})
        errors.append(relative_error(again, exact))
        output = _tensor(module(**example))
        turned = module(**other | {LATENTS: _following(other[LATENTS], output.roll(3, -2))})
        errors.append(relative_error(turned, exact))
        step = module(**other | {LATENTS: _following(other[LATENTS], _tensor(turned))})
        errors.append(relative_error(step, exact))
        stale = relative_error(module(**example | {LATENTS: _following(example[LATENTS], _tensor(step))}), want)
    return {"errors": errors, "stale": stale}


def without_latents(name: str, degrees: Degrees) -> dict[str, Any]:
    """Calls of a model whose outputs are had with the last patch only, so that no input is followed from step to step:
    their errors, and how many sets of buffers they took."""
    model, example, want = _load(name)
    with mock.patch.object(RankTasks, "cuts", (None,)), torch.no_grad():
        module = xir.trace(model, example).parallelize(**degrees).emit(model)
        outputs = [materialize(_tensor(module(**example))) for _ in range(4)]
        buffers = len(module._xdit_runner._code.memories._made)
    return {"errors": [relative_error(output, want) for output in outputs], "buffers": buffers}


def lost_rank(name: str, degrees: Degrees, how: str, seconds: int) -> dict[str, Any]:
    """Rank 1 dies, or sleeps, in the middle of a step."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=seconds))
    model, example = models.load(f"{name}:tiny")
    module = xir.trace(model, example).parallelize(**degrees).emit(model)

    def stop(number: int, item: Any) -> None:
        if dist.get_rank() == 1 and number == 3 and item.patch == 1:
            if how == "dies":
                os._exit(1)
            time.sleep(1000)

    def run() -> None:
        for output in _run(module, _inputs(example, 5)):
            materialize(_tensor(output))

    _queue(module).observe = stop
    return _failure(run)


def only_its_stages(name: str, degrees: Degrees) -> dict[str, Any]:
    """The weights of other stages are not needed: they may be on the meta device."""
    model, example, want = _load(name)
    parallel = xir.trace(model, example).parallelize(**degrees)
    module = parallel.emit(model)
    mine = set(module._xdit_runner.weights)
    for path, parameter in model.named_parameters():
        if path not in mine:
            owner, _, leaf = path.rpartition(".")
            empty = nn.Parameter(parameter.to("meta"), requires_grad=False)
            setattr(model.get_submodule(owner), leaf, empty)
    again = parallel.emit(model)
    with torch.no_grad():
        errors = [relative_error(run(**example), want) for run in (module, again)]
    bytes_here = sum(p.nbytes for p in model.parameters() if not p.is_meta)
    return {"errors": errors, "share": bytes_here / sum(p.nbytes for p in model.parameters())}


def folded_stages(name: str, stages: list[int], patches: Sequence[int]) -> list[dict[str, Any]]:
    """As `emitted_steps`, where every rank has two stages; and the order in which this rank ran them."""
    torch.set_num_threads(1)
    model, example = models.load(f"{name}:tiny")
    inputs, traced, found = _inputs(example, 4), xir.trace(model, example), []
    for count in patches:
        parallel = traced.parallelize(pipefusion=len(stages) // 2, patches=count, stages=stages)
        module, trace = parallel.emit(model), list[list[Any]]()
        _queue(module).observe = lambda number, item, trace=trace: trace.append([number, item.patch, item.stage])
        got, want = _run(module, inputs), parallel.simulate_steps(model, inputs)
        errors = [relative_error(mine, step[0]) for mine, step in zip(got, want, strict=True)]
        held = sum(len(task.carried_out) for task in module._xdit_runner.tasks.displaced.values())
        found.append({"errors": errors, "trace": trace, "held": held})
    return found


def compiled_stages(name: str, degrees: Degrees) -> dict[str, Any]:
    """Every block of every stage and patch compiles as one graph, buffers and all."""
    torch.set_num_threads(1)
    model, example = models.load(f"{name}:tiny")
    parallel, inputs = xir.trace(model, example).parallelize(**degrees), _inputs(example, 4)
    module = parallel.emit(model)
    for body in module.bodies.values():
        body.module.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    got, want = _run(module, inputs), parallel.simulate_steps(model, inputs)
    return {"errors": [relative_error(mine, step[0]) for mine, step in zip(got, want, strict=True)]}


@torch.no_grad()
def fixed_point(name: str, calls: int = 4, **degrees: Any) -> dict[str, Any]:
    """The errors of a ported model's calls against the model: with plain latents, again with the same, then with
    latents that are made of the last output but have the same numbers, so that what patches left for each other is
    right. Also how many calls were displaced, of how many `steps` that could be."""
    torch.set_num_threads(1)
    model, example = models.load(f"{name}:tiny")
    want = tensors_of(model(**copied(example)))
    port: Any = xir.port(model, mode="eager", **{"pipefusion": 2} | degrees)
    displaced, made_of = set[int](), 0
    try:
        outputs = [port(**copied(example))]
        made = port._xdit_specialisations
        made.factory.queue.observe = lambda number, item: item.patch is not None and displaced.add(number)
        tasks = RankTasks(made.programs[0].pipeline, dist.get_rank())
        while len(outputs) < calls:
            given = copied(example)
            if len(outputs) > 1:
                given = _made_of(outputs[-1], given, _latents(port, tasks, given))
                made_of += any(isinstance(leaf, Deferred) for leaf in pytree.tree_leaves(given))
            outputs.append(port(**given))
        errors = [difference.relative_error([materialize(x) for x in tensors_of(one)], want) for one in outputs]
    finally:
        port.reset()
    return {"errors": errors, "displaced": len(displaced), "steps": made_of}


def _latents(port: Any, tasks: RankTasks, given: dict[str, Any]) -> list[tuple[torch.Tensor, PatchCut]]:
    """Those of these arguments that follow the output from step to step, and how they are cut."""
    program = tasks.pipeline.program
    bound = bind_inputs(port._xdit_original, program, (), given)
    names = [node.name for node in placeholders(program.graph)]
    return [(x, tasks.latents[name]) for name, x in zip(names, bound, strict=True) if name in tasks.latents]


def _made_of(output: Any, given: dict[str, Any], latents: list[tuple[torch.Tensor, PatchCut]]) -> dict[str, Any]:
    """These arguments, whose latents are made of the output that they fit; what they have besides (of an image that is
    to be edited, in further channels) stays as it is."""

    sources = tensors_of(output)
    several = len(sources) > 1  # each follows its own; what is given behind them (a reference) stays as it is
    own = {id(x): [one] for (x, _), one in zip(latents, sources, strict=False)} if several else {}

    def follows(x: Any) -> Any:
        cut = next((cut for one, cut in latents if x is one), None)
        if cut is None:
            return x
        for source in own.get(id(x), () if several else sources):
            short = [dim for dim in range(x.dim()) if source.dim() == x.dim() and source.shape[dim] < x.shape[dim]]
            if source.dim() == x.dim() and not short:
                return _following(x, source, cut)
            if len(short) == 1:
                [dim], size = short, source.shape[short[0]]
                rest = x.narrow(dim, size, x.shape[dim] - size)
                return torch.cat([_following(x.narrow(dim, 0, size), source), rest], dim)
        return x

    return pytree.tree_map(follows, given)
