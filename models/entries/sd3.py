"""Stable Diffusion 3.5: joint blocks, the last without a text output; the tiny one has dual attention too."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Normal, Values

ENTRIES = {
    "sd3.5-large": Entry(
        cls="SD3Transformer2DModel",
        full=dict(sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=38,
                  attention_head_dim=64, num_attention_heads=38, joint_attention_dim=4096,
                  caption_projection_dim=2432, pooled_projection_dim=2048, pos_embed_max_size=192,
                  dual_attention_layers=(), qk_norm="rms_norm"),
        full_inputs=dict(  # 1024 x 1024; 77 CLIP + 256 T5 tokens; a guidance pair
            hidden_states=Normal((2, 16, 128, 128)), encoder_hidden_states=Normal((2, 333, 4096)),
            pooled_projections=Normal((2, 2048)), timestep=Values([750.0, 750.0], "float32"),
            return_dict=False),
        tiny=dict(sample_size=32, patch_size=2, in_channels=4, out_channels=4, num_layers=4,
                  attention_head_dim=16, num_attention_heads=4, joint_attention_dim=32,
                  caption_projection_dim=64, pooled_projection_dim=24, pos_embed_max_size=24,
                  dual_attention_layers=(0, 1), qk_norm="rms_norm"),
        tiny_inputs=dict(
            hidden_states=Normal((2, 4, 32, 32)), encoder_hidden_states=Normal((2, 16, 32)),
            pooled_projections=Normal((2, 24)), timestep=Values([750.0, 250.0], "float32"),
            return_dict=False),
    ),
}
