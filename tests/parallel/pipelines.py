"""Unmodified diffusers pipelines around tiny transformers with random weights, and the arguments of a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch

from xdit_ir import models

SIZE = 256  # pixels; 32 x 32 latents


def _noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _transformer(name: str) -> Any:
    return models.load(f"{name}:tiny")[0]


def _video() -> dict[str, Any]:
    """A prompt, another one for guidance, and four frames of latents."""
    return {
        "prompt_embeds": _noise(1, 1, 16, 32),
        "negative_prompt_embeds": _noise(2, 1, 16, 32),
        "height": 128,
        "width": 128,
        "num_frames": 13,
        "output_type": "latent",
    }


def flux() -> tuple[Any, dict[str, Any]]:
    """One call per step, whole batch."""
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=None,
        transformer=_transformer("flux.1-dev"),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    embeds = {"prompt_embeds": _noise(1, 1, 16, 32), "pooled_prompt_embeds": _noise(2, 1, 24)}
    return pipe, embeds | {"height": SIZE, "width": SIZE, "output_type": "latent", "max_sequence_length": 16}


def sd3() -> tuple[Any, dict[str, Any]]:
    """Both halves of guidance in one batch."""
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=_transformer("sd3.5-large"),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    return pipe, {
        "prompt_embeds": _noise(1, 1, 16, 32),
        "pooled_prompt_embeds": _noise(2, 1, 24),
        "negative_prompt_embeds": _noise(3, 1, 16, 32),
        "negative_pooled_prompt_embeds": _noise(4, 1, 24),
        "height": SIZE,
        "width": SIZE,
        "output_type": "latent",
    }


def pixart() -> tuple[Any, dict[str, Any]]:
    """An output of twice the channels of the latents."""
    pipe = diffusers.PixArtSigmaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=_transformer("pixart-sigma"),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )
    return pipe, {
        "prompt_embeds": _noise(1, 1, 16, 32),
        "prompt_attention_mask": torch.ones(1, 16),
        "negative_prompt_embeds": _noise(2, 1, 16, 32),
        "negative_prompt_attention_mask": torch.ones(1, 16),
        "negative_prompt": None,
        "height": SIZE,
        "width": SIZE,
        "use_resolution_binning": False,
        "output_type": "latent",
    }


def wan() -> tuple[Any, dict[str, Any]]:
    """Guidance by two calls per step."""
    pipe = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        transformer=_transformer("wan2.1-t2v-14b"),
        vae=None,
        scheduler=diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    )
    return pipe, _video()


def cogvideo() -> tuple[Any, dict[str, Any]]:
    """A scheduler that is stepped by itself, and frames before channels."""
    pipe = diffusers.CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=_transformer("cogvideox-5b"),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )
    return pipe, _video()


def hunyuandit() -> tuple[Any, dict[str, Any]]:
    """Long skips."""
    pipe = diffusers.HunyuanDiTPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=_transformer("hunyuandit"),
        scheduler=diffusers.DDPMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    embeds = {
        f"{kind}prompt_{what}{which}": value
        for kind, seed in (("", 1), ("negative_", 2))
        for which, length, width in (("", 6, 32), ("_2", 10, 16))
        for what, value in (("embeds", _noise(seed, 1, length, width)), ("attention_mask", torch.ones(1, length)))
    }
    return pipe, embeds | {
        "height": SIZE,
        "width": SIZE,
        "use_resolution_binning": False,
        "output_type": "latent",
    }


BUILDERS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    builder.__name__: builder for builder in (flux, sd3, pixart, wan, cogvideo, hunyuandit)
}
