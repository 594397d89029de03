"""Spatial transformers inside U-Nets: features in and out, no timestep (DreamLite, Versatile Diffusion)."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Mask, Normal

ENTRIES = {
    "dreamlite-block": Entry(  # without grouped heads: those need the U-Net's attention processor
        cls="DreamLiteTransformer2DModel", no_denoiser="a part of a U-Net: features in and out, no timestep",
        tiny=dict(num_attention_heads=4, attention_head_dim=8, in_channels=32, num_layers=3,
                  norm_num_groups=8, cross_attention_dim=32, use_linear_projection=True, qk_norm="rms_norm",
                  ff_mult=2),
        tiny_inputs=dict(
            hidden_states=Normal((2, 32, 16, 16)), encoder_hidden_states=Normal((2, 16, 32)),
            encoder_attention_mask=Mask(16, (16, 11)), return_dict=False),
    ),
    "dual-transformer": Entry(  # 77 text and 257 image tokens: the class fixes the lengths
        cls="DualTransformer2DModel", no_denoiser="a part of a U-Net: features in and out, no timestep",
        tiny=dict(num_attention_heads=4, attention_head_dim=8, in_channels=32, num_layers=2,
                  norm_num_groups=8, cross_attention_dim=32),
        tiny_inputs=dict(
            hidden_states=Normal((2, 32, 16, 16)), encoder_hidden_states=Normal((2, 334, 32)),
            return_dict=False),
    ),
}
