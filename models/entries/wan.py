"""Wan 2.1 text to video: 3D rotary positions, normalisation across heads, cross-attention to text."""
# fmt: off

from __future__ import annotations

from typing import Any

from ..specs import Entry, Normal, Values

SHARED: dict[str, Any] = dict(
    full_inputs=dict(  # 832 x 480, 81 frames
        hidden_states=Normal((1, 16, 21, 60, 104)), timestep=Values([750], "int64"),
        encoder_hidden_states=Normal((1, 512, 4096)), return_dict=False),
    tiny=dict(patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=16, in_channels=4,
              out_channels=4, text_dim=32, freq_dim=32, ffn_dim=128, num_layers=3,
              cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32),
    tiny_inputs=dict(
        hidden_states=Normal((2, 4, 4, 16, 16)), timestep=Values([750, 250], "int64"),
        encoder_hidden_states=Normal((2, 16, 32)), return_dict=False),
)
ENTRIES = {
    "wan2.1-t2v-14b": Entry(
        cls="WanTransformer3DModel",
        full=dict(patch_size=(1, 2, 2), num_attention_heads=40, attention_head_dim=128, in_channels=16,
                  out_channels=16, text_dim=4096, freq_dim=256, ffn_dim=13824, num_layers=40,
                  cross_attn_norm=True, qk_norm="rms_norm_across_heads"),
        sizes={"720p": dict(hidden_states=Normal((1, 16, 21, 90, 160)))},
        **SHARED,
    ),
    "wan2.1-t2v-1.3b": Entry(
        cls="WanTransformer3DModel",
        full=dict(patch_size=(1, 2, 2), num_attention_heads=12, attention_head_dim=128, in_channels=16,
                  out_channels=16, text_dim=4096, freq_dim=256, ffn_dim=8960, num_layers=30,
                  cross_attn_norm=True, qk_norm="rms_norm_across_heads"),
        **SHARED,
    ),
}
