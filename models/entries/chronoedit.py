"""ChronoEdit: Wan on two distant frames; cross-attention to exactly 512 text tokens and to an image."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Normal, Values

ENTRIES = {
    "chronoedit-14b": Entry(
        cls="ChronoEditTransformer3DModel",
        full=dict(patch_size=(1, 2, 2), num_attention_heads=40, attention_head_dim=128, in_channels=36,
                  out_channels=16, text_dim=4096, freq_dim=256, ffn_dim=13824, num_layers=40, image_dim=1280,
                  added_kv_proj_dim=5120, rope_max_seq_len=1024, rope_temporal_skip_len=8),
        full_inputs=dict(  # 832 x 480, two frames
            hidden_states=Normal((1, 36, 2, 60, 104)), timestep=Values([750], "int64"),
            encoder_hidden_states=Normal((1, 512, 4096)), encoder_hidden_states_image=Normal((1, 257, 1280)),
            return_dict=False),
        tiny=dict(patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=12, in_channels=8,
                  out_channels=4, text_dim=32, freq_dim=32, ffn_dim=128, num_layers=3, image_dim=24,
                  added_kv_proj_dim=48, rope_max_seq_len=32, rope_temporal_skip_len=8),
        tiny_inputs=dict(
            hidden_states=Normal((2, 8, 2, 16, 32)), timestep=Values([750, 250], "int64"),
            encoder_hidden_states=Normal((2, 512, 32)), encoder_hidden_states_image=Normal((2, 9, 24)),
            return_dict=False),
    ),
}
