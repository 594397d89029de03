"""Mochi: two streams of unlike width; padding text is dropped per sample, positions have learned frequencies."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Mask, Normal, Values

ENTRIES = {
    "mochi-1": Entry(
        cls="MochiTransformer3DModel",
        full=dict(patch_size=2, num_attention_heads=24, attention_head_dim=128, num_layers=48,
                  pooled_projection_dim=1536, in_channels=12, text_embed_dim=4096, time_embed_dim=256),
        full_inputs=dict(  # 848 x 480, 163 frames; a guidance pair
            hidden_states=Normal((2, 12, 28, 60, 106)), encoder_hidden_states=Normal((2, 256, 4096)),
            timestep=Values([750.0, 750.0]), encoder_attention_mask=Mask(256, (20, 120), "bool"),
            return_dict=False),
        tiny=dict(patch_size=2, num_attention_heads=4, attention_head_dim=16, num_layers=3,
                  pooled_projection_dim=48, in_channels=4, text_embed_dim=32, time_embed_dim=32),
        tiny_inputs=dict(
            hidden_states=Normal((2, 4, 4, 16, 16)), encoder_hidden_states=Normal((2, 16, 32)),
            timestep=Values([750.0, 250.0]), encoder_attention_mask=Mask(16, (16, 11), "bool"),
            return_dict=False),
    ),
}
