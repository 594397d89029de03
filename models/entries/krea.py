"""Krea 2: text and image in one sequence, grouped keys, gated attention; several layers of text fused."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Mask, Normal, Values

ENTRIES = {
    "krea-2": Entry(
        cls="Krea2Transformer2DModel",
        tiny=dict(in_channels=16, num_layers=3, attention_head_dim=16, num_attention_heads=4,
                  num_key_value_heads=2, intermediate_size=128, timestep_embed_dim=32, text_hidden_dim=32,
                  num_text_layers=3, text_num_attention_heads=4, text_num_key_value_heads=4,
                  text_intermediate_size=64, axes_dims_rope=(4, 6, 6)),
        tiny_inputs=dict(
            hidden_states=Normal((2, 256, 16)), encoder_hidden_states=Normal((2, 16, 3, 32)),
            timestep=Values([0.75, 0.25]), encoder_attention_mask=Mask(16, (16, 11), "bool"),
            position_ids=Values([[0, 0, 0]] * 16 + [[0, h, w] for h in range(16) for w in range(16)],
                                "float32"),
            return_dict=False),
    ),
}
