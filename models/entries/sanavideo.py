"""Sana-Video: linear attention with rotary positions, convolutions over space and time in the feed-forward."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Mask, Normal, Values

ENTRIES = {
    "sana-video-2b": Entry(
        cls="SanaVideoTransformer3DModel",
        full=dict(in_channels=16, out_channels=16, num_attention_heads=20, attention_head_dim=112, num_layers=20,
                  num_cross_attention_heads=20, cross_attention_head_dim=112, cross_attention_dim=2240,
                  caption_channels=2304, mlp_ratio=3.0, sample_size=30, patch_size=(1, 2, 2)),
        full_inputs=dict(  # 832 x 480, 81 frames; a guidance pair
            hidden_states=Normal((2, 16, 21, 60, 104)), encoder_hidden_states=Normal((2, 300, 2304)),
            timestep=Values([750.0, 750.0], "float32"), encoder_attention_mask=Mask(300, (20, 120)),
            return_dict=False),
        tiny=dict(in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=16, num_layers=3,
                  num_cross_attention_heads=4, cross_attention_head_dim=16, cross_attention_dim=64,
                  caption_channels=32, mlp_ratio=2.0, sample_size=16, patch_size=(1, 2, 2), rope_max_seq_len=32),
        tiny_inputs=dict(
            hidden_states=Normal((2, 4, 4, 16, 16)), encoder_hidden_states=Normal((2, 16, 32)),
            timestep=Values([750.0, 250.0], "float32"), encoder_attention_mask=Mask(16, (16, 11)),
            return_dict=False),
    ),
}
