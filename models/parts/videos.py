"""Autoencoders of videos: a few frames of 32 rows of latents."""
# fmt: off

from __future__ import annotations

from typing import Any

from ..specs import Normal, Part


def calls(frames: int, rows: int, columns: int, latents: tuple[int, ...], channels: int = 3) -> dict[str, Any]:
    """`encode` of frames of so many pixels, and `decode` of latents [channels, frames, rows, columns]."""
    return dict(
        encode=dict(x=Normal((1, channels, frames, rows, columns)), return_dict=False),
        decode=dict(z=Normal((1, *latents)), return_dict=False),
    )


ENTRIES = {
    "allegro": Part(  # only tiled; here with smaller tiles
        cls="AutoencoderKLAllegro",
        config=dict(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, layers_per_block=1, latent_channels=4),
        state=dict(use_tiling=True, kernel=(8, 64, 64), stride=(4, 32, 32), tile_overlap_t=4, tile_overlap_h=32,
                   tile_overlap_w=32),
        calls=calls(8, 256, 64, (4, 2, 32, 8))),
    "cogvideox": Part(
        cls="AutoencoderKLCogVideoX",
        config=dict(down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
                    block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2),
        calls=calls(9, 256, 16, (4, 3, 32, 2))),
    "cosmos": Part(
        cls="AutoencoderKLCosmos",
        config=dict(latent_channels=4, encoder_block_out_channels=(8,) * 4, decode_block_out_channels=(8,) * 4,
                    attention_resolutions=(8,), resolution=64, spatial_compression_ratio=4,
                    temporal_compression_ratio=4),
        calls=calls(9, 128, 16, (4, 3, 32, 4))),
    "hunyuan-image-refiner": Part(
        cls="AutoencoderKLHunyuanImageRefiner",
        config=dict(latent_channels=8, block_out_channels=(16, 16, 32), layers_per_block=1,
                    spatial_compression_ratio=4, temporal_compression_ratio=2),
        calls=calls(5, 128, 8, (8, 3, 32, 2))),
    "hunyuan-video": Part(
        cls="AutoencoderKLHunyuanVideo",
        config=dict(latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4),
        calls=calls(9, 256, 16, (4, 3, 32, 2))),
    "hunyuan-video-1.5": Part(
        cls="AutoencoderKLHunyuanVideo15",
        config=dict(latent_channels=8, block_out_channels=(16, 16, 32), layers_per_block=1,
                    spatial_compression_ratio=4, temporal_compression_ratio=2),
        calls=calls(5, 128, 8, (8, 3, 32, 2))),
    "kandinsky6-sr": Part(
        cls="Kandinsky6SRVAE",
        config=dict(latent_channels=8, encoder_block_out_channels=(32, 32, 64), decoder_block_out_channels=(32, 32, 64),
                    layers_per_block=1, temporal_compression_ratio=2),
        calls=calls(5, 128, 8, (8, 3, 32, 2))),
    "kvae-video": Part(
        cls="AutoencoderKLKVAEVideo",
        config=dict(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=4, temporal_compress_times=2),
        calls=calls(5, 64, 8, (4, 3, 32, 4))),
    "ltx-video": Part(
        cls="AutoencoderKLLTXVideo",
        config=dict(latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
                    layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5, upsample_factor=(1,) * 4,
                    spatio_temporal_scaling=(True, True, False, False), decoder_inject_noise=(False,) * 5,
                    decoder_spatio_temporal_scaling=(True, True, False, False), upsample_residual=(False,) * 4,
                    timestep_conditioning=False, patch_size=1, patch_size_t=1),
        calls=calls(9, 128, 16, (8, 3, 32, 4))),
    "ltx2-video": Part(
        cls="AutoencoderKLLTX2Video",
        config=dict(latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(16, 32, 64),
                    layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 4, spatio_temporal_scaling=(True,) * 4,
                    decoder_spatio_temporal_scaling=(True,) * 3, decoder_inject_noise=(False,) * 4,
                    downsample_type=("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
                    upsample_residual=(True,) * 3, upsample_factor=(2,) * 3, timestep_conditioning=False, patch_size=1,
                    patch_size_t=1, decoder_causal=False),
        calls=calls(9, 256, 16, (8, 3, 32, 2))),
    "magvit": Part(
        cls="AutoencoderKLMagvit",
        config=dict(latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=8,
                    down_block_types=("SpatialDownBlock3D", *("SpatialTemporalDownBlock3D",) * 3),
                    up_block_types=("SpatialUpBlock3D", *("SpatialTemporalUpBlock3D",) * 3), spatial_group_norm=True),
        calls=calls(9, 256, 16, (4, 3, 32, 2))),
    "minimax-h3": Part(
        cls="AutoencoderKLMiniMaxH3",
        config=dict(latent_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=8,
                    spatial_downsample_factors=(2, 2), temporal_downsample_factors=(2, 2), decoder_num_layers=2,
                    decoder_num_attention_heads=2, decoder_attention_head_dim=8, decoder_num_register_tokens=2,
                    decoder_ffn_mult=2, clip_length=17, token_drop=3, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4),
        calls=calls(22, 128, 16, (4, 7, 32, 4))),
    "mochi": Part(
        cls="AutoencoderKLMochi",
        config=dict(in_channels=15, latent_channels=4, encoder_block_out_channels=(32,) * 4,
                    decoder_block_out_channels=(32,) * 4, layers_per_block=(1,) * 5),
        calls=calls(7, 256, 16, (4, 2, 32, 2))),
    "qwen-image": Part(
        cls="AutoencoderKLQwenImage",
        config=dict(base_dim=16, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True],
                    latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4),
        calls=calls(1, 128, 16, (4, 1, 32, 4))),
    "qwen-image-2.1": Part(
        cls="AutoencoderKLQwenImage21",
        config=dict(base_dim=16, decoder_base_dim=16, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1,
                    temperal_downsample=[False, True], latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4),
        calls=calls(1, 128, 16, (4, 1, 32, 4), channels=4)),
    "temporal-decoder": Part(
        cls="AutoencoderKLTemporalDecoder",
        config=dict(block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
                    layers_per_block=1),
        calls=dict(encode=dict(x=Normal((2, 3, 64, 8)), return_dict=False),
                   decode=dict(z=Normal((2, 4, 32, 4)), num_frames=2, return_dict=False))),
    "vidtok": Part(
        cls="AutoencoderVidTok",
        config=dict(is_causal=False, ch=32, ch_mult=(1, 2, 2, 2), z_channels=6, double_z=False, num_res_blocks=1,
                    regularizer="fsq", codebook_size=262144),
        calls=dict(encode=dict(x=Normal((1, 3, 8, 128, 16))), decode=dict(z=Normal((1, 6, 4, 32, 2))))),
    "wan": Part(
        cls="AutoencoderKLWan",
        config=dict(base_dim=16, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True]),
        calls=calls(5, 128, 16, (4, 3, 32, 4))),
}
