"""Autoencoders of images: 32 rows of latents, 8 columns."""
# fmt: off

from __future__ import annotations

from ..specs import Normal, Part

DOWN, UP = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
TWICE = dict(  # an image of twice the size of its latents
    encode=dict(x=Normal((1, 3, 64, 16)), return_dict=False),
    decode=dict(z=Normal((1, 4, 32, 8)), return_dict=False),
)

ENTRIES = {
    "asymmetric-kl": Part(
        cls="AsymmetricAutoencoderKL",
        config=dict(down_block_types=DOWN, down_block_out_channels=(16, 32), layers_per_down_block=1, norm_num_groups=8,
                    up_block_types=UP, up_block_out_channels=(16, 32), layers_per_up_block=1),
        calls=TWICE),
    "consistency": Part(
        cls="ConsistencyDecoderVAE",
        config=dict(encoder_block_out_channels=(16, 32), encoder_in_channels=3, encoder_out_channels=4,
                    encoder_down_block_types=DOWN, encoder_norm_num_groups=2, decoder_add_attention=False,
                    decoder_block_out_channels=(16, 32), decoder_down_block_types=("ResnetDownsampleBlock2D",) * 2,
                    decoder_downsample_padding=1, decoder_in_channels=7, decoder_layers_per_block=1,
                    decoder_norm_num_groups=2, decoder_out_channels=6, decoder_num_train_timesteps=1024,
                    decoder_resnet_time_scale_shift="scale_shift", decoder_time_embedding_type="learned",
                    decoder_up_block_types=("ResnetUpsampleBlock2D",) * 2, latent_channels=4),
        calls=TWICE),
    "dc": Part(
        cls="AutoencoderDC",
        config=dict(latent_channels=4, attention_head_dim=8, downsample_block_type="conv",
                    encoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(16, 32),
                    encoder_qkv_multiscales=((), (5,)), encoder_layers_per_block=(1, 1),
                    decoder_block_types=("ResBlock", "EfficientViTBlock"), decoder_block_out_channels=(16, 32),
                    decoder_qkv_multiscales=((), (5,)), decoder_layers_per_block=(1, 1),
                    upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu"),
        calls=TWICE),
    "flux2": Part(
        cls="AutoencoderKLFlux2",
        config=dict(block_out_channels=(16, 32), down_block_types=DOWN, up_block_types=UP, latent_channels=4,
                    norm_num_groups=8),
        calls=TWICE),
    "hunyuan-image": Part(
        cls="AutoencoderKLHunyuanImage",
        config=dict(in_channels=3, out_channels=3, latent_channels=16, block_out_channels=(32, 64, 64),
                    layers_per_block=1, spatial_compression_ratio=4, sample_size=128),
        calls=dict(encode=dict(x=Normal((1, 3, 128, 16)), return_dict=False),
                   decode=dict(z=Normal((1, 16, 32, 4)), return_dict=False))),
    "kl": Part(
        cls="AutoencoderKL",
        config=dict(block_out_channels=(16, 32), down_block_types=DOWN, up_block_types=UP, latent_channels=4,
                    norm_num_groups=8),
        calls=TWICE),
    "kvae": Part(
        cls="AutoencoderKLKVAE",
        config=dict(channels=32, num_enc_blocks=1, num_dec_blocks=1, z_channels=4, ch_mult=(1, 2), sample_size=32),
        calls=TWICE),
    "rae": Part(
        cls="AutoencoderRAE",
        config=dict(encoder_type="dinov2", encoder_hidden_size=64, encoder_patch_size=14, encoder_num_hidden_layers=2,
                    encoder_input_size=224, patch_size=4, image_size=64, decoder_hidden_size=32,
                    decoder_num_hidden_layers=2, decoder_num_attention_heads=4, decoder_intermediate_size=64,
                    scaling_factor=1.0),
        calls=dict(encode=dict(x=Normal((1, 3, 224, 224)), return_dict=False),
                   decode=dict(z=Normal((1, 64, 16, 16)), return_dict=False))),
    "tiny": Part(
        cls="AutoencoderTiny",
        config=dict(encoder_block_out_channels=(16, 16), decoder_block_out_channels=(16, 16),
                    num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)),
        calls=dict(encode=dict(x=Normal((1, 3, 64, 16)), return_dict=False),
                   decode=dict(x=Normal((1, 4, 32, 8)), return_dict=False))),
    "vq": Part(
        cls="VQModel",
        config=dict(block_out_channels=(16, 32), norm_num_groups=8, down_block_types=DOWN, up_block_types=UP,
                    latent_channels=3, num_vq_embeddings=16),
        calls=dict(encode=dict(x=Normal((1, 3, 64, 16)), return_dict=False),
                   decode=dict(h=Normal((1, 3, 32, 8)), return_dict=False))),
}
