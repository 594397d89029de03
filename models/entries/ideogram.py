"""Ideogram 4: text and image in one sequence, text padded on the left, attention inside segments, M-RoPE."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Normal, Values

TEXTS = (16, 11)  # tokens of each sample's text
IMAGE = [[65536, 65536 + h, 65536 + w] for h in range(16) for w in range(16)]

ENTRIES = {
    "ideogram-4": Entry(
        cls="Ideogram4Transformer2DModel",
        tiny=dict(in_channels=16, num_layers=3, attention_head_dim=16, num_attention_heads=4,
                  intermediate_size=128, adaln_dim=24, llm_features_dim=32, mrope_section=(2, 2, 2)),
        tiny_inputs=dict(  # [padding | text | image], over all of which the latents and features extend
            hidden_states=Normal((2, 272, 16)), timestep=Values([0.75, 0.25]),
            encoder_hidden_states=Normal((2, 272, 32)),
            position_ids=Values([[[0] * 3] * (16 - n) + [[i] * 3 for i in range(n)] + IMAGE for n in TEXTS],
                                "int64"),
            segment_ids=Values([[-1] * (16 - n) + [1] * (n + 256) for n in TEXTS], "int64"),
            indicator=Values([[0] * (16 - n) + [3] * n + [2] * 256 for n in TEXTS], "int64"),
            return_dict=False),
    ),
}
