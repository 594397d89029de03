"""FLUX.3: a stack of blocks for each of text, image and reference, then joint ones; modulations per token."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Normal, Values

ENTRIES = {
    "flux.3": Entry(
        cls="Flux3Transformer2DModel",
        tiny=dict(in_channels=16, cond_in_channels=12, num_layers=2, num_single_layers=2,
                  attention_head_dim=16, num_attention_heads=4, joint_attention_dim=32, timestep_channels=32,
                  axes_dims_rope=(4, 4, 4, 4), flow_map=True),
        tiny_inputs=dict(
            hidden_states=Normal((2, 256, 16)), encoder_hidden_states=Normal((2, 16, 32)),
            timestep=Values([0.75, 0.25]), target_timestep=Values([0.5, 0.125]),
            img_ids=Values([[0, i // 16, i % 16, 0] for i in range(256)], "int64"),
            txt_ids=Values([[0, 0, 0, i] for i in range(16)], "int64"),
            image_cond_hidden_states=Normal((2, 64, 12)),
            image_cond_ids=Values([[10, i // 8, i % 8, 0] for i in range(64)], "int64"), return_dict=False),
    ),
}
