"""A pipeline's folder as users have it, with a tokenizer, a text encoder and everything else, all tiny and random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SIZE = 128  # pixels; 8 x 8 tokens


def build() -> Any:
    """A pipeline of the class `PixArtSigmaPipeline` that takes prompts."""
    import diffusers
    import tokenizers
    import transformers

    from xdit_ir import models

    words = {"[PAD]": 0, "[UNK]": 1, "a": 2, "cat": 3, "dog": 4, "lighthouse": 5, "at": 6, "dusk": 7, "blurry": 8}
    bare = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    bare.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    named = {"unk_token": "[UNK]", "pad_token": "[PAD]", "model_max_length": 16}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bare, **named)
    transformer = models.load("pixart-sigma:tiny")[0]
    sizes = {"d_model": transformer.config.caption_channels, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    encoder = transformers.T5EncoderModel(transformers.T5Config(vocab_size=len(words), **sizes))
    vae = diffusers.AutoencoderKL(
        latent_channels=transformer.config.in_channels,
        block_out_channels=(8, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
    )
    return diffusers.PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=models.randomize(encoder, 1).eval(),
        vae=models.randomize(vae).eval(),
        transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


def build_video() -> tuple[Any, dict[str, Any]]:
    """A `WanPipeline` without text encoder, and embeddings for it."""
    import diffusers
    import torch

    from xdit_ir import models

    transformer = models.load("wan2.1-t2v-14b:tiny")[0]
    channels = transformer.config.in_channels
    flat = {"latents_mean": [0.0] * channels, "latents_std": [1.0] * channels}
    vae = diffusers.AutoencoderKLWan(base_dim=8, z_dim=channels, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **flat)
    parts = {"vae": models.randomize(vae).eval(), "transformer": transformer, "tokenizer": None, "text_encoder": None}
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    noise = torch.randn(2, 1, 16, transformer.config.text_dim, generator=torch.Generator().manual_seed(1))
    pipe = diffusers.WanPipeline(scheduler=scheduler, **parts)
    return pipe, {"prompt_embeds": noise[0], "negative_prompt_embeds": noise[1]}


def save(folder: Path) -> Path:
    """Write the first, its transformer and its autoencoder in several shards."""
    build().save_pretrained(folder, max_shard_size="100KB")
    return folder
