"""What every rank does in the tests; each function returns plain data for the test to judge."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.utils import _pytree as pytree

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.capture.effects import copied
from xdit_ir.capture.objects import expand_objects
from xdit_ir.emission.code_store import CodeStore
from xdit_ir.ir.graphs import all_graphs
from xdit_ir.ir.partial_attention import merge_partials
from xdit_ir.tools import calibrate_worker

Degrees = dict[str, int]


def relative_error(got: Any, want: Any) -> float:
    """Largest relative error over the tensors of two outputs of equal structure."""
    pairs = zip(pytree.tree_leaves(_plain(got)), pytree.tree_leaves(_plain(want)), strict=True)
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs if isinstance(b, torch.Tensor))


def _plain(output: Any) -> Any:
    return dict(output) if hasattr(output, "items") else output


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def _load(name: str) -> tuple[nn.Module, dict[str, Any], Any]:
    torch.set_num_threads(1)
    model, example = models.load(f"{name}:tiny")
    with torch.no_grad():
        return model, example, model(**example)


def _failure(function: Callable[[], Any]) -> dict[str, Any]:
    start = time.monotonic()
    try:
        function()
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error), "seconds": time.monotonic() - start}
    return {"error": "", "message": "", "seconds": time.monotonic() - start}


def equal_outputs(name: str, degree_sets: list[Degrees]) -> dict[str, Any]:
    """Emit the model for each set of degrees and compare with one device."""
    model, example, want = _load(name)
    traced = xir.trace(model, example)
    errors, kinds = [], []
    for degrees in degree_sets:
        module = traced.parallelize(**degrees).emit(model)
        with torch.no_grad():
            got = module(**example)
        errors.append(relative_error(got, want))
        kinds.append(type(got) is type(want))
    return {"errors": errors, "kinds": kinds}


def tiled(name: str, degrees: Degrees) -> dict[str, Any]:
    """The same where links are slow; also how many attentions of a layer are in tiles."""
    model, example, want = _load(name)
    parallel = xir.trace(model, example).parallelize(**degrees, machine=xir.Machine(bytes=1e6, latency=0.0))
    tiles = [node for _, graph, _ in all_graphs(parallel.ir) for node in graph.nodes if node.target is merge_partials]
    with torch.no_grad():
        return {"error": relative_error(parallel.emit(model)(**example), want), "tiles": len(tiles)}


def left_behind(name: str, degrees: Degrees) -> dict[str, Any]:
    """Outputs, and the tensors in what the model was given to write into, of a ported model and of one device."""
    torch.set_num_threads(1)
    model, example = models.load(f"{name}:tiny")
    alone, given = copied(example), copied(example)
    before = _tensors(example)
    with torch.no_grad():
        want = model(**alone)
        got = xir.port(model, **degrees)(**given)
    pairs = zip(_tensors(given), _tensors(alone), strict=True)
    kept = [relative_error([mine], [theirs]) for mine, theirs in pairs if theirs.is_floating_point()]
    return {"error": relative_error(got, want), "kept": max(kept), "written": len(_tensors(alone)) - len(before)}


def _tensors(example: dict[str, Any]) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(expand_objects(example)) if isinstance(leaf, torch.Tensor)]


class Reader(nn.Module):
    """One layer of attention over the first `max(lengths)` tokens: a model that reads an input's contents."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor, flip: bool = False) -> torch.Tensor:
        """`x [batch, tokens, 8]` -> `[batch, max(lengths), 8]`."""
        x = x[:, : int(lengths.max())]
        q, k, v = self.qkv(x.flip(-1) if flip else x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        heads = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(heads.transpose(1, 2).flatten(2))


def _reader(tokens: int = 12) -> tuple[Reader, dict[str, Any]]:
    torch.manual_seed(0)
    return Reader(), {"x": torch.randn(2, tokens, 8), "lengths": torch.tensor([7, 10])}


def _first(example: dict[str, Any]) -> dict[str, Any]:
    """The first half of a batch of two."""
    halves = (isinstance(item, torch.Tensor) and item.shape[:1] == (2,) for item in example.values())
    return {key: item[:1] if half else item for (key, item), half in zip(example.items(), halves, strict=True)}


def reloaded_weights(name: str, degrees: Degrees) -> dict[str, Any]:
    """Load other weights after the first forward: into the original, into the port, and by assignment."""
    model, example, _ = _load(name)
    ported = xir.port(model, **degrees)
    errors = []
    with torch.no_grad():
        ported(**example)
        for seed, load in enumerate((model.load_state_dict, ported.load_state_dict, _assign(ported)), 1):
            other = models.load(f"{name}:tiny", seed=seed)[0]
            load(other.state_dict())
            errors.append(relative_error(ported(**example), other(**example)))
    return {"errors": errors, "programs": len(ported.programs)}


def _assign(module: nn.Module) -> Callable[[Any], Any]:
    return lambda state: module.load_state_dict(state, assign=True)


def prompts(degrees: Degrees, batch: int, lengths: list[int]) -> list[list[Any]]:
    """[number of programs, error] after each of these prompts of padded text, all of one step's calls made first."""
    model, example = models.load("kind-pooled-text:tiny")
    ported = xir.port(model, **degrees, trim_padding=True)
    seen: list[list[Any]] = []
    with torch.no_grad():
        for length in lengths:
            pair = []
            for real in (length, 7):  # with the prompt and without
                mask = (torch.arange(256) < real).long().expand(batch, -1)
                given = {name: x[:batch] for name, x in example.items()} | {"mask": mask.contiguous()}
                pair.append((ported(**given), model(**given)))
            seen.append([len(ported.programs), max(relative_error(got, want) for got, want in pair)])
    return seen


def specialisations(degrees: Degrees) -> list[list[Any]]:
    """[number of programs, error, shape] after each call of a model that reads lengths."""
    model, example = _reader()
    ported = xir.port(model, **degrees)
    longer = _reader(tokens=15)[1]
    calls = [
        example,
        {**example, "x": example["x"] + 1},
        {**example, "lengths": torch.tensor([10, 7])},
        {**example, "flip": True},
        longer,
        example,
        {**example, "x": example["x"].double()},
    ]
    seen: list[list[Any]] = []
    with torch.no_grad():
        for call in calls:
            model.to(call["x"].dtype)
            got = ported(**call)
            error = relative_error(got, model(**call))
            seen.append([len(ported.programs), error, ported.program is ported.programs[0]])
    return seen


def changed_model(degrees: Degrees) -> list[list[Any]]:
    """[number of programs, error] after a submodule is replaced, after an unseen change, and after `reset`."""
    model, example = _reader()
    ported = xir.port(model, **degrees)
    seen: list[list[Any]] = []
    with torch.no_grad():
        ported(**example)
        torch.manual_seed(5)
        ported.out = nn.Linear(8, 16)
        seen.append([len(ported.programs), relative_error(ported(**example), model(**example))])
        assert len(ported.programs) == 2
        ported.reset()
        seen.append([len(ported.programs), relative_error(ported(**example), model(**example))])
    return seen


def differing_inputs(change: str, degrees: Degrees, how: str) -> dict[str, Any]:
    """Rank 1 calls otherwise than rank 0; afterwards both make the same call again."""
    model, example = _reader()
    if how == "emit":
        module: Any = xir.trace(model, example).parallelize(**degrees).emit(model)
    else:
        module = xir.port(model, **degrees)
    with torch.no_grad():
        if how != "first call":
            module(**example)
        call: dict[str, Any] = dict(example)
        if _rank() == 1:
            call |= {
                "shape": {"x": torch.randn(2, 14, 8)},
                "dtype": {"x": example["x"].double()},
                "value": {"flip": True},
                "contents": {"lengths": torch.tensor([7, 9])},
                "unknown": {"surplus": 1},
                "meta": {"x": example["x"].to("meta")},
            }[change]
        result = _failure(lambda: module(**call))
        result["afterwards"] = relative_error(module(**example), model(**example))
    return result


def gradient_on_one_rank(degrees: Degrees, how: str) -> dict[str, Any]:
    """Rank 1 wants the gradient of an input; afterwards both make the same call without."""
    model, example = _reader()
    traced = xir.trace(model, example)
    module: Any = traced.parallelize(**degrees).emit(model) if how == "emit" else xir.port(model, **degrees)
    x = example["x"].clone().requires_grad_(_rank() == 1)
    result = _failure(lambda: module(**{**example, "x": x}))
    with torch.no_grad():
        result["afterwards"] = relative_error(module(**example), model(**example))
    return result


def other_noise(degrees: Degrees) -> list[dict[str, Any]]:
    """Rank 1 draws other noise; then the ranks' inputs differ by rounding only."""
    model, example = _reader()
    ported = xir.port(model, **degrees)
    noise = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(_rank()))
    rounded = example["x"] * (1 + 1e-6 * noise)
    return [_failure(lambda x=x: ported(**{**example, "x": x})) for x in (noise, rounded)]


def failing_trace(degrees: Degrees) -> dict[str, Any]:
    """A model that cannot be traced on rank 1 alone."""
    model, example = _reader()
    if _rank() == 1:
        model.register_forward_pre_hook(lambda module, args: 1 / 0)
    return _failure(lambda: xir.port(model, **degrees)(**example))


class Refusing(nn.Module):
    """Refuses what it is given, on every rank in words of its own."""

    def forward(self, x: torch.Tensor, fails: bool) -> torch.Tensor:
        if fails:
            raise ValueError(f"rank {_rank()} does not like it")
        return x * 2


def refused_on_all(degrees: Degrees) -> dict[str, Any]:
    """What forward itself raises on all ranks, and how right the next call is."""
    x = torch.ones(2, 4)
    port = xir.port(Refusing(), **degrees)
    found = _failure(lambda: port(x, fails=True))
    with torch.no_grad():
        found["afterwards"] = relative_error(port(x, fails=False), 2 * x)
    return found


def batch_of_one(name: str) -> dict[str, Any]:
    """cfg=2 with a batch of one, which emitting refuses and a port puts off, then with two."""
    model, example, want = _load(name)
    one = _first(example)
    result = _failure(lambda: xir.trace(model, one).parallelize(cfg=2).emit(model))
    ported = xir.port(model, cfg=2)
    with torch.no_grad():
        result["alone"] = relative_error(ported(**one), model(**one))
        result["afterwards"] = relative_error(ported(**example), want)
    result["programs"] = len(ported.programs)
    return result


def wrong_world_size(degrees: Degrees) -> list[dict[str, Any]]:
    """Once before the process group exists, and whatever way the module is made."""
    model, example = _reader()
    program = xir.trace(model, example).parallelize(**degrees)
    return [_failure(lambda: program.emit(model)), _failure(lambda: xir.port(model, **degrees)(**example))]


def no_handshake(degrees: Degrees) -> float:
    """Without the handshake there is no side group."""
    model, example = _reader()
    ported = xir.port(model, handshake=False, **degrees)
    with torch.no_grad():
        return relative_error(ported(**example), model(**example))


def compiled_bodies(name: str, degrees: Degrees) -> dict[str, Any]:
    """Compile each shared block, whole; all layers must use it."""
    from torch._dynamo.utils import counters

    model, example, want = _load(name)
    emitted = xir.trace(model, example).parallelize(**degrees).emit(model)
    torch._dynamo.reset()
    counters.clear()
    for body in emitted.bodies.values():
        body.module.compile(backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        error = relative_error(emitted(**example), want)
    return {"error": error, "bodies": len(emitted.bodies), "graphs": counters["stats"]["unique_graphs"]}


def new_shapes(degrees: Degrees) -> list[dict[str, Any]]:
    """Calls with other numbers of tokens, uneven ones too; how many graphs were compiled in each."""
    model, example, _ = _load("plain-mmdit")
    port = xir.port(model, mode="compiled", **degrees)
    graphs: list[Any] = []
    plain, kept = torch.compile, CodeStore.of

    def compile(function: Any, options: Any = None, **given: Any) -> Any:
        return plain(function, backend=lambda graph, _: graphs.append(graph) or graph.forward, **given)

    calls = []
    torch.manual_seed(0)
    torch.compile = compile  # type: ignore[assignment]
    CodeStore.of = lambda device: None  # type: ignore[assignment,method-assign]
    try:
        for height, text in ((24, 16), (26, 16), (22, 31), (24, 9)):
            given = {**example, "x": torch.randn(2, 4, height, 44), "text": torch.randn(2, text, 32)}
            before = len(graphs)
            with torch.no_grad():
                error = relative_error(port(**given), model(**given))
            calls.append({"error": error, "compiled": len(graphs) - before})
    finally:
        torch.compile, CodeStore.of = plain, kept  # type: ignore[method-assign]
    return calls


def pipeline(degrees: Degrees, steps: int) -> dict[str, Any]:
    """An unmodified diffusers pipeline, before and after its transformer is replaced."""
    from flux_pipeline import build_pipeline, generate

    torch.set_num_threads(1)
    pipe = build_pipeline()
    want = generate(pipe, steps)
    pipe.transformer = xir.port(pipe.transformer, **degrees)
    got = generate(pipe, steps)
    return {
        "error": (got - want).abs().max().item(),
        "spread": want.std().item(),
        "programs": len(pipe.transformer.programs),
    }


def from_checkpoint(name: str, folder: str, degrees: Degrees) -> dict[str, Any]:
    """A model without weights, ported with a checkpoint; then with one that rank 1 cannot read."""
    from accelerate import init_empty_weights

    model, example, want = _load(name)
    with init_empty_weights():
        bare = type(model).from_config(model.config).eval()
    with torch.no_grad():
        error = relative_error(xir.port(bare, weights=folder, **degrees)(**example), want)
    elsewhere = folder if _rank() == 0 else f"{folder}/elsewhere.safetensors"
    failure = _failure(lambda: xir.port(bare, weights=elsewhere, **degrees)(**example))
    return failure | {"difference": error, "resident": sum(not tensor.is_meta for tensor in bare.parameters())}


def _wan() -> Any:
    """An unmodified `WanPipeline` of real parts, tiny and with random weights."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline

    transformer: Any = models.load("wan2.1-t2v-14b:tiny")[0]
    channels = transformer.config.in_channels
    torch.manual_seed(0)
    flat = {"latents_mean": [0.0] * channels, "latents_std": [1.0] * channels}
    vae = AutoencoderKLWan(base_dim=8, z_dim=channels, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **flat).eval()
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    scheduler = UniPCMultistepScheduler(**flow)
    pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler, transformer=transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _video(pipe: Any, steps: int, prompts: int, negative_tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    width = pipe.transformer.config.text_dim
    embeds = (torch.randn(prompts, tokens, width, generator=generator) for tokens in (16, negative_tokens))
    names = ("prompt_embeds", "negative_prompt_embeds")
    size = {"height": 128, "width": 128, "num_frames": 5, "num_inference_steps": steps}
    video: torch.Tensor = pipe(
        **dict(zip(names, embeds, strict=True)), **size, guidance_scale=5.0, generator=generator, output_type="pt"
    ).frames
    return video


def guidance(
    degrees: Degrees, steps: int, readers: list[int] | None = None, prompts: int = 1, negative_tokens: int = 16
) -> dict[str, Any]:
    """A pipeline that calls its transformer twice a step; `readers`: ranks that read every result at once."""
    import warnings

    from xdit_ir.runtime.runner import Runner

    torch.set_num_threads(1)
    pipe = _wan()
    want = _video(pipe, steps, prompts, negative_tokens)
    pipe.transformer = xir.port(pipe.transformer, **degrees)
    if _rank() in (readers or ()):
        pipe.transformer.register_forward_hook(lambda module, args, output: output[0].mean().item() and None)
    compute, runs = Runner.compute, []
    Runner.compute = lambda *args: runs.append(1) or compute(*args)  # type: ignore[method-assign, func-returns-value]
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            got = _video(pipe, steps, prompts, negative_tokens)
    finally:
        Runner.compute = compute  # type: ignore[method-assign]
    return {
        "difference": relative_error(got, want),
        "spread": want.std().item(),
        "runs": len(runs),
        "warned": sum("divides neither a batch nor" in str(one.message) for one in caught),
        "plain": type(got) is torch.Tensor,
    }


def weights_in_parts(name: str, degrees: Degrees, folder: str = "") -> dict[str, Any]:
    """A model of whose weights ranks hold parts, for two kinds of inputs; what each rank holds then, and what
    becomes of other weights that are loaded."""
    model, example, want = _load(name)
    total = sum(x.nbytes for x in model.state_dict().values())
    short, loading = _first(example), {"weights": folder, "release": True} if folder else {}
    with torch.no_grad():
        want_short = model(**short)
        ported = xir.port(model, **degrees, **loading)
        errors = [relative_error(ported(**example), want), relative_error(ported(**short), want_short)]
        tensors = [x for one in ported._xdit_specialisations.found for x in one.runner._weights.fetch()]
        found = {
            "resident": sum(not x.is_meta for x in model.parameters()),
            "held": sum({x.data_ptr(): x.nbytes for x in tensors}.values()) / total,
            "reported": ported.report().weight_share,
            "programs": len(ported.programs),
        }
        other = {name: torch.zeros(x.shape, dtype=x.dtype) for name, x in model.state_dict().items()}
        refused = [_failure(lambda: ported.load_state_dict(other))["message"]]
        errors.append(relative_error(ported(**example), want))
        model.bfloat16()
        half = pytree.tree_map_only(torch.Tensor, lambda x: x.bfloat16() if x.is_floating_point() else x, example)
        refused.append(_failure(lambda: ported(**half))["message"])
        model.float()
        model.load_state_dict(other, assign=True)
        refused.append(_failure(lambda: ported(**example))["message"])
    return {**found, "errors": errors, "refused": refused}


def unlike_weights(degrees: Degrees) -> dict[str, Any]:
    """Each rank has filled the model with other numbers before its weights are divided."""
    torch.manual_seed(_rank())
    model, (_, example) = Reader().eval(), _reader()
    return _failure(lambda: xir.port(model, **degrees)(**example))


def planned(name: str, given: Degrees) -> dict[str, Any]:
    """A port whose degrees nobody gave, or not all; and what it said that it took."""
    model, example, want = _load(name)
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("xdit_ir")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    ported = xir.port(model, **given)
    try:
        with torch.no_grad():
            errors = [relative_error(ported(**example), want) for _ in range(2)]
    finally:
        logger.removeHandler(handler)
    assert ported.program is not None
    return {"errors": errors, "degrees": dict(ported.program.mesh.degrees), "said": said}


def on_hosts(name: str, given: Degrees) -> dict[str, Any]:
    """A port on as many hosts as ranks, and how many kinds of links its choices were priced with."""
    model, example, want = _load(name)
    ported = xir.port(model, **given)
    with mock.patch("xdit_ir.porting.planned.host", lambda: f"node-{_rank()}"), torch.no_grad():
        error = relative_error(ported(**example), want)
    links = ported._xdit_specialisations.schedule["machine"].links
    return {"error": error, "links": len(links.each) if links else 1}


def calibrated(output: str) -> list[str]:
    """What a calibration of all processes says on this one."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    said: list[str] = []
    calibrate_worker._say = said.append  # type: ignore[assignment]
    calibrate_worker.calibrate(torch.device("cpu"), Path(output), time.monotonic() + 60, least=0.02)
    return said


def unplannable() -> list[dict[str, Any]]:
    """A model that cannot be captured on rank 0, which plans; afterwards all is as before."""
    model, example = _reader()
    hook = model.register_forward_pre_hook(lambda module, args: 1 / 0) if _rank() == 0 else None
    ported = xir.port(model)
    first = _failure(lambda: ported(**example))
    if hook is not None:
        hook.remove()
    return [first, _failure(lambda: ported(**example))]


def planned_by_some(name: str) -> list[dict[str, Any]]:
    """Degrees that rank 0 gives and the others do not; afterwards all is as before."""
    model, example, _ = _load(name)
    count = dist.get_world_size()
    unlike = xir.port(model, **({"ulysses": count, "machine": xir.Machine()} if _rank() == 0 else {}))
    first = _failure(lambda: unlike(**example))
    return [first, _failure(lambda: xir.port(model)(**example))]


def saved_plan(name: str) -> dict[str, Any]:
    """A port by a plan that went through a file; and by one for another number of processes."""
    model, example, want = _load(name)
    made = xir.plan(model, example, gpus=dist.get_world_size(), machine="h100")
    ported = xir.port(model, plan=xir.Plan.from_json(made.to_json()))
    with torch.no_grad():
        error = relative_error(ported(**example), want)
    assert ported.program is not None
    alone = xir.plan(model, example, gpus=1)
    refused = _failure(lambda: xir.port(model, plan=alone))
    return {"error": error, "degrees": dict(ported.program.mesh.degrees), "best": made.best, "refused": refused}
