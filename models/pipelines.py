"""Whole pipelines of diffusers with random weights, as data: a denoiser of the zoo, an autoencoder, a scheduler, and
the arguments of a call, with texts as embeddings (there is no text encoder)."""
# fmt: off

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .build import build, named
from .weights import randomize


@dataclass(frozen=True)
class Assembly:
    """The class of a pipeline; the denoiser's name in the zoo; class and configuration of the autoencoder and of the
    scheduler; numbers and embeddings (their shapes) of a call."""

    cls: str
    denoiser: str
    vae: tuple[str, Mapping[str, Any]]
    scheduler: tuple[str, Mapping[str, Any]]
    call: Mapping[str, Any]
    texts: Mapping[str, tuple[int, ...]]


_FLOW = ("FlowMatchEulerDiscreteScheduler", dict(shift=3.0))
_UNIPC = ("UniPCMultistepScheduler", dict(prediction_type="flow_prediction", use_flow_sigmas=True))
_KL = dict(latent_channels=16, layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 4,
           up_block_types=("UpDecoderBlock2D",) * 4, use_quant_conv=False, use_post_quant_conv=False)
_PAIR = ("prompt_embeds", "negative_prompt_embeds")
ENTRIES = {
    "flux.1-dev": Assembly(
        "FluxPipeline", "flux.1-dev", ("AutoencoderKL", dict(_KL, block_out_channels=(128, 256, 512, 512))), _FLOW,
        dict(height=1024, width=1024), dict(prompt_embeds=(1, 512, 4096), pooled_prompt_embeds=(1, 768))),
    "flux.1-dev:2048px": Assembly(
        "FluxPipeline", "flux.1-dev", ("AutoencoderKL", dict(_KL, block_out_channels=(128, 256, 512, 512))), _FLOW,
        dict(height=2048, width=2048), dict(prompt_embeds=(1, 512, 4096), pooled_prompt_embeds=(1, 768))),
    "wan2.1-t2v-1.3b": Assembly(
        "WanPipeline", "wan2.1-t2v-1.3b", ("AutoencoderKLWan", {}), _UNIPC,
        dict(height=480, width=832, num_frames=81), dict.fromkeys(_PAIR, (1, 512, 4096))),
    "wan2.1-t2v-14b": Assembly(
        "WanPipeline", "wan2.1-t2v-14b", ("AutoencoderKLWan", {}), _UNIPC,
        dict(height=480, width=832, num_frames=81), dict.fromkeys(_PAIR, (1, 512, 4096))),
    "wan2.1-t2v-14b:tiny": Assembly(
        "WanPipeline", "wan2.1-t2v-14b:tiny",
        ("AutoencoderKLWan", dict(base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
                                  latents_mean=[0.0] * 4, latents_std=[1.0] * 4)),
        _UNIPC, dict(height=64, width=64, num_frames=5), dict.fromkeys(_PAIR, (1, 16, 32))),
}
# fmt: on


def assemble(one: Assembly, load: Any, device: torch.device, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """The pipeline on a device, equal on every process, and the arguments of a call; `load` makes models of the zoo."""
    (vae, config), (scheduler, options) = one.vae, one.scheduler
    kind: Any = named(one.cls)
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    absent = {parameter.name: None for parameter in parameters if parameter.default is parameter.empty}
    parts = {
        "transformer": load(one.denoiser, device=device, dtype=dtype)[0],
        "vae": randomize(build(vae, dict(config), device, dtype)),
        "scheduler": named(scheduler)(**options),
    }
    pipe = kind(**absent | parts)
    pipe.set_progress_bar_config(disable=True)
    made = torch.Generator().manual_seed(1)
    texts = {name: torch.randn(shape, generator=made).to(device, dtype) for name, shape in one.texts.items()}
    return pipe, {**one.call, **texts, "output_type": "pt"}
