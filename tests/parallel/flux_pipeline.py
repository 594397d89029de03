"""A tiny FLUX pipeline of real diffusers parts with random weights: nothing is downloaded.

Only the text encoders are missing; prompt embeddings are passed instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from xdit_ir import models

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline

SIZE = 256  # pixels; 16 x 16 = 256 image tokens
TEXT_TOKENS = 16


def build_pipeline(seed: int = 0) -> FluxPipeline:
    """A `FluxPipeline` on the CPU in float32: real scheduler, tiny VAE, the zoo's tiny FLUX.1 transformer.

    Deterministic in `seed`; the global random state is left as it was.
    """
    from diffusers import FluxPipeline

    transformer: Any = models.load("flux.1-dev:tiny", seed=seed)[0]
    pipe = FluxPipeline(
        scheduler=_scheduler(),
        vae=_vae(transformer.config.in_channels // 4, seed),
        transformer=transformer,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(
    pipe: FluxPipeline,
    steps: int = 4,
    seed: int = 0,
    *,
    images: int = 1,
    on_step: Callable[[], object] | None = None,
) -> torch.Tensor:
    """Run the whole pipeline: float32 images [images, 3, 256, 256] in [0, 1], deterministic in `seed`.

    `on_step` is called after each denoising step.
    """

    def stepped(pipe: FluxPipeline, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if on_step is not None:
            on_step()
        return values

    generator = torch.Generator("cpu").manual_seed(seed)
    config = pipe.transformer.config
    result = pipe(
        prompt_embeds=_noise(generator, pipe, 1, TEXT_TOKENS, config.joint_attention_dim),
        pooled_prompt_embeds=_noise(generator, pipe, 1, config.pooled_projection_dim),
        height=SIZE,
        width=SIZE,
        num_inference_steps=steps,
        num_images_per_prompt=images,
        guidance_scale=3.5,
        callback_on_step_end=stepped,
        generator=generator,
        output_type="pt",
    )
    image: Any = result.images
    assert isinstance(image, torch.Tensor)
    return image.float()


def _noise(generator: torch.Generator, pipe: FluxPipeline, *shape: int) -> torch.Tensor:
    noise = torch.randn(shape, generator=generator, device="cpu")
    return noise.to(pipe.transformer.device, pipe.transformer.dtype)


def _scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of FLUX.1-dev as published."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def _vae(channels: int, seed: int) -> AutoencoderKL:
    """A narrow VAE of FLUX's structure: latents [N, channels, H / 8, W / 8]."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        latent_channels=channels,
        block_out_channels=(8, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=SIZE,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return models.randomize(vae, seed).eval()
