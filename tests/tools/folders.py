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


def save(folder: Path) -> Path:
    """Write one, the transformer in several shards."""
    build().save_pretrained(folder, max_shard_size="100KB")
    return folder


if __name__ == "__main__":
    import sys

    save(Path(sys.argv[1]))
