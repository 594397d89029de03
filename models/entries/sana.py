"""Sana: linear attention, depthwise convolution in the feed-forward, masked cross-attention, no positions."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Mask, Normal, Values

ENTRIES = {
    "sana-1600m": Entry(
        cls="SanaTransformer2DModel",
        full=dict(in_channels=32, out_channels=32, num_attention_heads=70, attention_head_dim=32,
                  num_layers=20, num_cross_attention_heads=20, cross_attention_head_dim=112,
                  cross_attention_dim=2240, caption_channels=2304, mlp_ratio=2.5, sample_size=32,
                  patch_size=1),
        full_inputs=dict(  # 1024 x 1024; a guidance pair
            hidden_states=Normal((2, 32, 32, 32)), encoder_hidden_states=Normal((2, 300, 2304)),
            encoder_attention_mask=Mask(300, (20, 120)), timestep=Values([750.0, 750.0], "float32"),
            return_dict=False),
        tiny=dict(in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=16, num_layers=3,
                  num_cross_attention_heads=2, cross_attention_head_dim=32, cross_attention_dim=64,
                  caption_channels=32, mlp_ratio=2.5, sample_size=16, patch_size=1),
        tiny_inputs=dict(
            hidden_states=Normal((2, 8, 16, 16)), encoder_hidden_states=Normal((2, 16, 32)),
            encoder_attention_mask=Mask(16, (16, 11)), timestep=Values([750.0, 250.0], "float32"),
            return_dict=False),
    ),
}
