"""Qwen-Image 2.1: one sequence of text and images, causal between segments; conditions modulate from time zero."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Mask, Normal, Values

SLOTS = [False] * 6 + [True] * 16 + [False] * 10 + [True] * 64  # text, condition image, text, target image

ENTRIES = {
    "qwen-image-2.1": Entry(
        cls="QwenImage21Transformer2DModel",
        tiny=dict(in_channels=16, out_channels=16, num_layers=3, attention_head_dim=16, num_attention_heads=4,
                  context_in_dim=32, axes_dims_rope=(4, 6, 6)),
        tiny_inputs=dict(
            hidden_states=Normal((2, 64 + 256, 16)), encoder_hidden_states=Normal((2, 32, 32)),
            timestep=Values([0.75, 0.25]), img_shapes=[[(1, 8, 8), (1, 16, 16)]] * 2,
            img_mask=Values([SLOTS] * 2, "bool"), encoder_hidden_states_mask=Mask(32, (32, 27)),
            return_dict=False),
    ),
}
