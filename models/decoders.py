"""Decoders of published size, as data: what benchmarks and the scripts for GPUs decode."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Decoder:
    """A class of diffusers, the shape of its latents, what is not its default, and whether tiles are on."""

    cls: str
    latents: tuple[int, ...]
    config: dict[str, Any] = field(default_factory=dict)
    tiled: bool = False

    def made(self) -> Any:
        """The autoencoder with new weights, on the device that is the default."""
        import diffusers

        vae: Any = getattr(diffusers, self.cls)(**self.config).eval()
        if self.tiled:
            vae.enable_tiling()
        return vae


FLUX = {
    "latent_channels": 16,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "sample_size": 1024,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
DECODERS = {
    "wan-480p": Decoder("AutoencoderKLWan", (1, 16, 21, 60, 104)),
    "wan-720p": Decoder("AutoencoderKLWan", (1, 16, 21, 90, 160)),
    "wan-480p-tiled": Decoder("AutoencoderKLWan", (1, 16, 21, 60, 104), tiled=True),
    "flux-1024px": Decoder("AutoencoderKL", (1, 16, 128, 128), FLUX),
    "flux-2048px": Decoder("AutoencoderKL", (1, 16, 256, 256), FLUX),
    "flux-2048px-tiled": Decoder("AutoencoderKL", (1, 16, 256, 256), FLUX, tiled=True),
    "hunyuanvideo": Decoder("AutoencoderKLHunyuanVideo", (1, 16, 5, 60, 104)),
    "hunyuanvideo-tiled": Decoder("AutoencoderKLHunyuanVideo", (1, 16, 16, 90, 160), tiled=True),
    "cogvideox": Decoder("AutoencoderKLCogVideoX", (1, 16, 3, 60, 90)),
}
