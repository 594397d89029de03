"""The tasks of docs/cookbook.md on tiny models: what they load is put in place of what they name."""

from __future__ import annotations

import contextlib
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import pipelines  # type: ignore[import-not-found]
import torch
from pipeline_jobs import adapter, error  # type: ignore[import-not-found]
from safetensors.torch import save_file

import xdit_ir as xir
from xdit_ir import models

DOCS = Path(__file__).parents[2] / "docs"
ON_CPU = {'"cuda"': '"cpu"', "torch.bfloat16": "torch.float32"}
SMALL, FLUX = {'"steps": 28': '"steps": 2', "1024": "128"}, "black-forest-labs/FLUX.1-dev"
# What is given in words and pixels of the published model, and for the tiny one by its own call.
REPLACED = {"prompt", "negative_prompt", "height", "width", "num_frames", "num_inference_steps"}


SIZES = {"flux2": 64, "qwen_edit": 64, "wan_i2v": 128}  # of pictures, in pixels


def flux2() -> pipelines.Case:
    part = models.part("flux2")
    pipe, call = pipelines.flux2()
    components = pipe.components | {"vae": models.randomize(diffusers.AutoencoderKLFlux2(**part.config)).eval()}
    return diffusers.Flux2Pipeline(**components), call | {"height": 64, "width": 64}


def wan_i2v() -> pipelines.Case:
    transformers = [pipelines._transformer("wan2.1-t2v-14b", seed, in_channels=12) for seed in (0, 1)]
    pipe, call = pipelines.wan_i2v()
    parts = {"vae": pipe.vae, "transformer_2": transformers[1], "boundary_ratio": 0.9}
    made = pipelines._assembled(type(pipe), transformers[0], pipelines._unipc(), **parts)
    return made, call


def ltx2() -> pipelines.Case:
    sound = {"audio_in_channels": 16, "audio_out_channels": 16}
    heads = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1, "num_learnable_registers": 16}
    of_both = {f"{kind}_connector_{name}": size for kind in ("video", "audio") for name, size in heads.items()}
    connectors = diffusers.pipelines.ltx2.LTX2TextConnectors(24, 2, **of_both)
    parts = {
        "vae": models.randomize(diffusers.AutoencoderKLLTX2Video(**models.part("ltx2-video").config).eval()),
        "audio_vae": models.randomize(diffusers.AutoencoderKLLTX2Audio(**models.part("ltx2-audio").config).eval()),
        "connectors": models.randomize(connectors.eval()),
    }
    scheduler = pipelines._flow(use_dynamic_shifting=True)
    pipe = pipelines._assembled(diffusers.LTX2Pipeline, pipelines._transformer("ltx-2", **sound), scheduler, **parts)
    call = {
        name: pipelines._noise(seed, 1, 16, 48) for seed, name in enumerate(("prompt_embeds", "negative_prompt_embeds"))
    }
    masks = {name: torch.ones(1, 16) for name in ("prompt_attention_mask", "negative_prompt_attention_mask")}
    return pipe, call | masks | {**pipelines._video(17), "spatio_temporal_guidance_blocks": [1]}


def inpaint() -> pipelines.Case:
    pipe, call = pipelines.img2img()
    del call["image"], call["strength"]
    return diffusers.FluxInpaintPipeline(**pipe.components), call


BUILDERS: dict[str, Callable[[], pipelines.Case]] = {
    "flux2": flux2,
    "qwen_edit": pipelines.qwen_edit,
    "wan_i2v": wan_i2v,
    "ltx2": ltx2,
    "lora": pipelines.flux,
    "controlnet": pipelines.flux_controlnet,
    "inpaint": inpaint,
    "quantised": pipelines.flux,
}


def tasks() -> dict[str, str]:
    """The tasks of the page by name."""
    page = (DOCS / "cookbook.md").read_text()
    return dict(re.findall(r"<!-- task: (\w+) -->\n```python\n(.*?)```", page, re.DOTALL))


def cooked(name: str, published: str) -> dict[str, Any]:
    """How far the result of a task is from that of one process; `published`: a pipeline's folder."""
    torch.set_num_threads(1)
    code = tasks()[name]
    for there, here in (ON_CPU | (SMALL | {FLUX: published} if name == "memory" else {})).items():
        code = code.replace(there, here)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        _write_files(Path(folder))
        got = _run(name, code)
        with mock.patch.object(xir, "port", lambda model, **_: model), mock.patch.object(xir, "generate", _alone):
            want = _run(name, code)
    errors = [error(one, other) for one, other in zip(got, want, strict=True)]
    return {"errors": errors, "spread": min(x.std().item() for x in want)}


def _write_files(folder: Path) -> None:
    """What tasks read: a module, adapters."""
    [module] = re.findall(r"<!-- file: mydit.py -->\n```python\n(.*?)```", (DOCS / "porting.md").read_text(), re.DOTALL)
    (folder / "mydit.py").write_text(module)
    transformer = models.load("flux.1-dev:tiny")[0]
    for seed, name in enumerate(("ink", "oil")):
        save_file(adapter(transformer, 4, seed), folder / f"{name}.safetensors")


def _alone(folder: str, prompt: str, *, seed: int = 0, **given: Any) -> Any:
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    given = {name: given[name] for name in ("width", "height")}
    options = {"guidance_scale": 3.5, "num_inference_steps": 2, "generator": torch.Generator().manual_seed(seed)}
    return mock.Mock(results=[pipe(prompt, **given, **options).images])


def _run(name: str, code: str) -> list[torch.Tensor]:
    """The tensors that a task ends with."""
    space: dict[str, Any] = {"__name__": name}
    with _tiny(name), mock.patch.object(sys, "path", [str(Path.cwd()), *sys.path]):
        exec(compile(code, "cookbook.md", "exec"), space)
    sys.modules.pop("mydit", None)
    result = [space["result"], *([space["sound"]] if "sound" in space else [])]
    return [_tensor(one) for one in result]


def _tensor(result: Any) -> torch.Tensor:
    if isinstance(result, torch.Tensor):
        return torch.as_tensor(result).float()
    return torch.tensor(diffusers.image_processor.VaeImageProcessor().pil_to_numpy(result))


@contextlib.contextmanager
def _tiny(name: str) -> Iterator[None]:
    """Tiny models in the place of those that a task loads, with words and pixels of their own."""
    if name not in BUILDERS:
        yield
        return
    pipe, call = BUILDERS[name]()
    pipe.set_progress_bar_config(disable=True)
    kind, size = type(pipe), SIZES.get(name, pipelines.SIZE)
    original = kind.__call__

    def called(self: Any, *_: Any, **given: Any) -> Any:
        torch.manual_seed(0)
        kept = {key: item for key, item in given.items() if key not in REPLACED}
        return original(self, **call | kept, num_inference_steps=2)

    with contextlib.ExitStack() as patches:
        for owner, loaded in ((kind, pipe), (diffusers.FluxControlNetModel, pipe.components.get("controlnet"))):
            patches.enter_context(mock.patch.object(owner, "from_pretrained", return_value=loaded))
        patches.enter_context(mock.patch.object(kind, "__call__", called))
        patches.enter_context(mock.patch("diffusers.utils.load_image", lambda _: pipelines._picture(size)))
        yield
