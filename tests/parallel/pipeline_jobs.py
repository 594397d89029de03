"""Jobs about whole pipelines: what every rank does; each returns plain data for the test to judge."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import diffusers
import pipelines
import torch
from jobs import Degrees, _plain

import xdit_ir as xir
from xdit_ir import capture, models
from xdit_ir.degrees import parse
from xdit_ir.ir.difference import tensors_of
from xdit_ir.porting.ported import Ported
from xdit_ir.tools.pipeline_worker import contenders


def run(pipe: Any, call: dict[str, Any], steps: int = 2) -> torch.Tensor:
    """The latents that a pipeline ends with."""
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)  # some pipelines sample the latents of an image without the generator
    result = pipe(num_inference_steps=steps, generator=torch.Generator().manual_seed(0), **call)
    [latents] = tensors_of(_plain(result))
    return latents.float()


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest error, relative to the largest value."""
    return ((got - want).abs().max() / want.abs().max()).item()


def whole_pipelines(
    name: str, degree_sets: list[Degrees], denoisers: list[str] | None, steps: int = 2
) -> list[dict[str, Any]]:
    """Per set of degrees: how far a ported pipeline is from itself on one process, and what was made."""
    torch.set_num_threads(1)
    pipe, call = pipelines.BUILDERS[name]()
    want, found = run(pipe, call, steps), []
    for degrees in degree_sets:
        pipe, call = pipelines.BUILDERS[name]()
        xir.port(pipe, denoisers=denoisers, **degrees)
        got = run(pipe, call, steps)
        ported = [component for component in pipe.components.values() if isinstance(component, Ported)]
        programs = [len(component.programs) for component in ported]
        found.append({"error": error(got, want), "spread": want.std().item(), "programs": programs})
    return found


def cached_pipelines(name: str, degrees: Degrees, threshold: float, steps: int, requests: int = 2) -> dict[str, Any]:
    """How far a ported pipeline with a step cache is from diffusers' own cache on one process, request by request, and
    how many calls were left out here and there."""
    torch.set_num_threads(1)
    pipe, call = pipelines.BUILDERS[name]()
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=threshold))
    with calls_of_blocks(pipe.transformer) as counted:
        want = run(pipe, call, steps)
    pipe.transformer.disable_cache()
    exact = run(pipe, call, steps)
    xir.port(pipe, cache=f"first-block:{threshold}", denoisers=["transformer"], **degrees)
    errors = [error(run(pipe, call, steps), want) for _ in range(requests)]
    used = pipe.transformer.report().cache
    first, *_, last = counted.values()
    found = {"errors": errors, "reused": error(exact, want), "want": [first, first - last]}
    return found | {"got": [used.calls, used.skipped]}


def hooked_pipelines(name: str, degrees: Degrees, threshold: float, steps: int) -> list[dict[str, Any]]:
    """For each of diffusers' caches that a port takes over, the first enabled before and the others after `port`: how
    far the pipeline is from itself on one process, and how many calls were left out here and there."""
    torch.set_num_threads(1)
    ratios = torch.linspace(1.01, 0.95, steps)
    magnitudes = diffusers.hooks.MagCacheConfig(num_inference_steps=steps, mag_ratios=ratios, max_skip_steps=2)
    configs = [diffusers.FirstBlockCacheConfig(threshold=threshold), magnitudes]
    pipe, call = pipelines.BUILDERS[name]()
    exact, wanted, before = run(pipe, call, steps), [], (0, 0)
    for config in configs:
        pipe.transformer.enable_cache(config)
        with calls_of_blocks(pipe.transformer) as counted:
            want = run(pipe, call, steps)
        wanted.append((want, max(counted.values()), min(counted.values())))
        pipe.transformer.disable_cache()
    pipe.transformer.enable_cache(configs[0])
    xir.port(pipe, denoisers=["transformer"], **degrees)
    found: list[dict[str, Any]] = []
    calls = wanted[0][1]  # the first block decides, and is called whenever the model is
    for config, (want, _, computed) in zip(configs, wanted, strict=True):
        if config is not configs[0]:
            pipe.transformer.enable_cache(config)
        errors = [error(run(pipe, call, steps), want)]
        used = pipe.transformer.report().cache
        got = [used.calls - before[0], used.skipped - before[1]]
        before = (used.calls, used.skipped)
        found.append({"errors": errors, "reused": error(exact, want), "want": [calls, calls - computed], "got": got})
        pipe.transformer.disable_cache()
    return [*found, {"error without": error(run(pipe, call, steps), exact)}]


def hooked_modules(
    name: str, degrees: Degrees, caches: list[str], more: dict[str, Any], steps: int
) -> list[dict[str, Any]]:
    """`hooked_pipelines` for caches of single modules, with `more` arguments of the pipeline; "guidance" stands for
    those of a second prompt."""
    torch.set_num_threads(1)
    pipe, call = pipelines.BUILDERS[name]()
    if more.pop("guidance", False):
        call |= {f"negative_{key}": -x for key, x in call.items() if key.endswith("prompt_embeds")}
    exact, wanted, got = run(pipe, call := call | more, steps), [], (0, 0)
    for cache in caches:
        pipe.transformer.enable_cache(module_cache(cache, pipe))
        with calls_of_blocks(pipe.transformer, ATTENTIONS) as counted, calls_of_blocks(pipe.transformer, "") as all_of:
            wanted.append((run(pipe, call, steps), sum(all_of.values()), min(counted.values())))
        pipe.transformer.disable_cache()
    xir.port(pipe, denoisers=["transformer"], **degrees)
    found: list[dict[str, Any]] = []
    for cache, (want, calls, computed) in zip(caches, wanted, strict=True):
        pipe.transformer.enable_cache(module_cache(cache, pipe))
        errors = [error(run(pipe, call, steps), want) for _ in range(2)]
        used = pipe.transformer.report().cache
        now, got = [used.calls - got[0], used.skipped - got[1]], (used.calls, used.skipped)
        found.append({"errors": errors, "reused": error(exact, want), "want": [calls, calls - computed], "got": now})
        pipe.transformer.disable_cache()
    return [*found, {"error without": error(run(pipe, call, steps), exact)}]


ATTENTIONS = r".*\.attn\d?"


def module_cache(kind: str, pipe: Any) -> Any:
    """A configuration of diffusers for a cache that reuses what single modules gave."""
    taylor = {"cache_interval": 3, "disable_cache_before_step": 2, "taylor_factors_dtype": torch.float32}
    if kind == "broadcast":
        return diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            cross_attention_block_skip_range=4,
            spatial_attention_timestep_skip_range=(100, 950),
            cross_attention_timestep_skip_range=(100, 950),
            current_timestep_callback=lambda: pipe.current_timestep,
        )
    if kind == "faster":
        return diffusers.FasterCacheConfig(
            spatial_attention_timestep_skip_range=(-1, 950),
            attention_weight_callback=lambda module: pipe.current_timestep / 2000,
            current_timestep_callback=lambda: pipe.current_timestep,
            is_guidance_distilled=True,
        )
    options = {"use_lite_mode": True} if kind == "lite" else {"cache_identifiers": [ATTENTIONS], "max_order": 2}
    return diffusers.hooks.TaylorSeerCacheConfig(**taylor, **options)


@contextlib.contextmanager
def calls_of_blocks(transformer: Any, chosen: str = r"\w+\.\d+") -> Iterator[dict[str, int]]:
    """How often the weights of each block are used: those of blocks that a cache leaves out are not."""
    counted: dict[str, int] = {}
    handles = []
    for name, module in transformer.named_modules():
        if re.fullmatch(chosen, name):
            linear = next(one for one in module.modules() if isinstance(one, torch.nn.Linear))
            counted[name] = 0

            def count(*_: Any, name: str = name) -> None:
                counted[name] += 1

            handles.append(linear.register_forward_hook(count))
    yield counted
    for handle in handles:
        handle.remove()


LAYERS = ("attn.to_q", "attn.to_k", "attn.to_out.0", "ff.net.2", "proj_mlp")


def adapter(transformer: Any, rank: int, seed: int) -> dict[str, torch.Tensor]:
    """A LoRA of some linear layers, as diffusers loads it."""
    make, found = torch.Generator().manual_seed(seed), dict[str, torch.Tensor]()
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith(LAYERS):
            shapes = {"lora_A": (rank, module.in_features), "lora_B": (module.out_features, rank)}
            found |= {
                f"transformer.{name}.{part}.weight": torch.randn(shape, generator=make) * shape[1] ** -0.5
                for part, shape in shapes.items()
            }
    return found


Act = Callable[[Any], dict[str, Any] | None]


def lora_acts(pipe: Any) -> dict[str, Act]:
    """What a user does to the adapters of a pipeline, one after the other; some give arguments for the next call."""
    one, other, swapped = (adapter(pipe.transformer, rank, seed) for rank, seed in ((4, 1), (2, 2), (4, 3)))
    return {
        "load": lambda pipe: pipe.load_lora_weights(dict(one), adapter_name="one"),
        "scale": lambda pipe: pipe.set_adapters("one", 0.3),
        "second": lambda pipe: pipe.load_lora_weights(dict(other), adapter_name="other"),
        "both": lambda pipe: pipe.set_adapters(["one", "other"], [0.5, 0.7]),
        "scale of a call": lambda pipe: {"joint_attention_kwargs": {"scale": 0.4}},
        "hot-swap": lambda pipe: pipe.load_lora_weights(dict(swapped), adapter_name="one", hotswap=True),
        "disable": lambda pipe: pipe.disable_lora(),
        "enable": lambda pipe: pipe.enable_lora(),
        "fuse": lambda pipe: pipe.fuse_lora(lora_scale=0.6),
        "unfuse": lambda pipe: pipe.unfuse_lora(),
        "delete": lambda pipe: pipe.delete_adapters("other"),
        "unload": lambda pipe: pipe.unload_lora_weights(),
    }


def adapters(degrees: Degrees, port_at: str) -> list[dict[str, Any]]:
    """After every act: how far the ported pipeline is from another one to which the same was done, how far that is
    from its latents before the act, and the number of programs. The port is made before the act `port_at`."""
    torch.set_num_threads(1)
    (alone, call), (pipe, _) = pipelines.flux(), pipelines.flux()
    found, before = [], run(alone, call)
    for name, act in lora_acts(alone).items():
        if name == port_at:
            xir.port(pipe, **degrees)
        extra = act(alone) or {}
        act(pipe)
        want, got = run(alone, call | extra), run(pipe, call | extra)
        programs = len(pipe.transformer.programs) if isinstance(pipe.transformer, Ported) else 0
        found.append({"act": name, "error": error(got, want), "change": error(want, before), "programs": programs})
        before = want
    return found


def generate_files(arguments: list[str]) -> dict[str, Any]:
    """The command on this rank of a job: its status, and what it prints."""
    from xdit_ir.ir.mesh import Mesh
    from xdit_ir.tools.cli import main
    from xdit_ir.transport.distributed import ensure_process_group

    torch.set_num_threads(1)
    ensure_process_group(torch.device("cpu"), Mesh.of(ulysses=2))  # left to the jobs that follow
    return _printed(main, ["generate", *arguments])


def demo(arguments: list[str]) -> dict[str, Any]:
    """The same for the demo, which ends the job's process group."""
    from xdit_ir.tools.demo import main

    return _printed(main, arguments)


def _printed(main: Callable[[list[str]], int], arguments: list[str]) -> dict[str, Any]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(arguments)
    return {"status": status, "out": out.getvalue(), "err": err.getvalue()}


def parts(kind: str, pays: bool) -> dict[str, Any]:
    """A ported autoencoder of a pipeline, tiled or not: how far its results are from those of one process, and how it
    ran."""
    torch.set_num_threads(1)
    pipe = pipelines.with_autoencoder()
    vae = pipe.vae
    if kind == "tiling":
        vae.enable_tiling()
    images = torch.randn(2, 3, 64, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mode()
        want = vae.decode(latents).sample
        xir.port(pipe, ulysses=2, **({} if pays else {"components": ["vae"]}))
        again = vae.encode(images).latent_dist.mode()
        got = vae.decode(latents, return_dict=False)[0]
    whole = ""
    try:
        vae.decode.report()
    except xir.XditError as refusal:
        whole = str(refusal)
    return {
        "error": max(error(again, latents), error(got, want)),
        "programs": [len(method.programs) for method in (vae.encode, vae.decode)],
        "share": vae.decode.report().share if not whole else 1.0,
        "whole": whole,
    }


def in_a_grid(machine: str) -> dict[str, Any]:
    """Decoders of a square image, of a high one and of the square one again, ported to four processes: their errors,
    meshes and shares."""
    torch.set_num_threads(1)
    pipe, found = pipelines.with_autoencoder(), dict[str, Any]()
    make = torch.Generator().manual_seed(1)
    latents = [torch.randn(shape, generator=make) for shape in ((1, 4, 14, 13), (1, 4, 48, 2))]
    with torch.no_grad():
        wants = [pipe.vae.decode(each).sample for each in latents]
        xir.port(pipe, ulysses=4, components=["vae"], machine=xir.Machine.parse(machine))
        for name, place in (("square", 0), ("high", 1), ("again", 0)):
            got = pipe.vae.decode(latents[place]).sample
            degrees = {dim: size for dim, size in pipe.vae.decode.programs[0].mesh.degrees.items() if size > 1}
            share = pipe.vae.decode.report().share
            found[name] = {"error": error(got, wants[place]), "mesh": degrees, "share": share}
    return found | {"programs": len(pipe.vae.decode.programs)}


def whole_images(degrees: Degrees) -> dict[str, Any]:
    """A pipeline from prompt to pixels with everything ported: how far its images are from those of one process."""
    torch.set_num_threads(1)
    call = pipelines.flux()[1] | {"output_type": "pt", "height": 64, "width": 64}
    want = run(pipelines.with_autoencoder(), call)
    pipe = xir.port(pipelines.with_autoencoder(), components=["transformer", "vae"], **degrees)
    got = run(pipe, call)
    return {"error": error(got, want), "spread": want.std().item(), "share": pipe.vae.decode.report().share}


def timed(name: str, degrees: str) -> dict[str, Any]:
    """What `bench --pipeline` finds of a pipeline, smaller still, and the traces of its decoder."""
    torch.set_num_threads(1)
    pipe, call = models.load_pipeline(name)
    call |= {"height": 32, "width": 32, "num_frames": 1, "num_inference_steps": 2}
    traced, real = [], capture.trace

    def counted(model: Any, *args: Any, **kwargs: Any) -> Any:
        traced.append(type(model).__name__)
        return real(model, *args, **kwargs)

    found: dict[str, Any] = {}
    with mock.patch.object(capture, "trace", counted):
        for part in contenders(pipe, call, parse(degrees)[0], 2, torch.device("cpu"), 1e-3):
            found |= part
    return found | {"decoders": sum("decode" in name for name in traced)}


def encoders_in_parts(names: list[str], degrees: Degrees) -> dict[str, Any]:
    """A denoiser and encoders of texts, ported together: the error of each on this rank, and the part of its weights
    that the rank holds; what parameters still have values."""
    torch.set_num_threads(1)
    pipe, calls = pipelines.with_encoders(names)
    with torch.no_grad():
        wants = {name: tensors_of(module(**calls[name])) for name, module in pipe.components.items()}
        sizes = {name: sum(x.nbytes for x in module.state_dict().values()) for name, module in pipe.components.items()}
        pipe, found = xir.port(pipe, **degrees), {}
        for name, module in pipe.components.items():
            got = tensors_of(_plain(module(**calls[name])))
            [one] = module._xdit_specialisations.found
            held = {x.data_ptr(): x.nbytes for x in one.runner._weights.fetch()}
            found[name] = {
                "error": max(error(mine, want) for mine, want in zip(got, wants[name], strict=True)),
                "held": sum(held.values()) / sizes[name],
                "resident": sum(not x.is_meta for x in module.parameters()),
            }
    return found
