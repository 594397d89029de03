"""Latte: spatial and temporal blocks in turn, frames and patches swapping places with the batch."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Normal, Values

ENTRIES = {
    "latte-1": Entry(
        cls="LatteTransformer3DModel",
        full=dict(num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28,
                  cross_attention_dim=1152, attention_bias=True, sample_size=64, patch_size=2,
                  activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
                  norm_elementwise_affine=False, norm_eps=1e-6, caption_channels=4096, video_length=16),
        full_inputs=dict(  # 512 x 512, 16 frames; a guidance pair
            hidden_states=Normal((2, 4, 16, 64, 64)), timestep=Values([750, 750], "int64"),
            encoder_hidden_states=Normal((2, 120, 4096)), enable_temporal_attentions=True, return_dict=False),
        tiny=dict(num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2,
                  cross_attention_dim=64, attention_bias=True, sample_size=16, patch_size=2,
                  activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
                  norm_elementwise_affine=False, norm_eps=1e-6, caption_channels=32, video_length=4),
        tiny_inputs=dict(
            hidden_states=Normal((2, 4, 4, 16, 16)), timestep=Values([750, 250], "int64"),
            encoder_hidden_states=Normal((2, 16, 32)), enable_temporal_attentions=True, return_dict=False),
    ),
}
