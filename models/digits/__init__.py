"""A small latent DiT that really generates: handwritten digits by class, with classifier-free guidance.

`pipeline/` is a folder as diffusers' `DiTPipeline.save_pretrained` writes it (float16): `DiTTransformer2DModel` of six
blocks (width 128, 256 image tokens), a small `AutoencoderKL` (64 x 64 pixels to latents [4, 16, 16]) and a
`DDIMScheduler`; `classifier.safetensors` tells which digit an image shows. Both are made by `train.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from xdit_ir.models.digits.classifier import Classifier

if TYPE_CHECKING:
    from diffusers import DiTPipeline

PIPELINE = Path(__file__).parent / "pipeline"
CLASSIFIER = Path(__file__).parent / "classifier.safetensors"


def load_pipeline(dtype: torch.dtype = torch.float32) -> DiTPipeline:
    """The trained pipeline on the CPU, without a progress bar: class labels 0 to 9 to images of 64 x 64 pixels."""
    from diffusers import DiTPipeline

    pipe = DiTPipeline.from_pretrained(PIPELINE, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_classifier() -> Classifier:
    """The trained classifier on the CPU in float32, in evaluation mode."""
    from safetensors.torch import load_file

    classifier = Classifier()
    classifier.load_state_dict({name: value.float() for name, value in load_file(CLASSIFIER).items()})
    return classifier.eval()
