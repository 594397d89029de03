"""Ovis-Image: two streams, then one, as FLUX, with gated feed-forwards and no pooled text."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Ids, Normal, Values

ENTRIES = {
    "ovis-image-7b": Entry(
        cls="OvisImageTransformer2DModel",
        full=dict(in_channels=64, num_layers=6, num_single_layers=27, attention_head_dim=128,
                  num_attention_heads=24, joint_attention_dim=2048, axes_dims_rope=(16, 56, 56)),
        full_inputs=dict(  # 1024 x 1024
            hidden_states=Normal((1, 4096, 64)), encoder_hidden_states=Normal((1, 256, 2048)),
            timestep=Values([0.75]), img_ids=Ids((64, 64)), txt_ids=Values([[0, i, i] for i in range(256)]),
            return_dict=False),
        tiny=dict(in_channels=16, out_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
                  num_attention_heads=4, joint_attention_dim=32, axes_dims_rope=(4, 6, 6)),
        tiny_inputs=dict(
            hidden_states=Normal((2, 256, 16)), encoder_hidden_states=Normal((2, 16, 32)),
            timestep=Values([0.75, 0.25]), img_ids=Ids((16, 16)), txt_ids=Values([[0, i, i] for i in range(16)]),
            return_dict=False),
    ),
}
