"""Chroma: FLUX.1 with modulations from one small network and a mask over the joint sequence."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Ids, Normal, Values

ENTRIES = {
    "chroma1-hd": Entry(
        cls="ChromaTransformer2DModel",
        full=dict(in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128,
                  num_attention_heads=24, joint_attention_dim=4096, axes_dims_rope=(16, 56, 56),
                  approximator_num_channels=64, approximator_hidden_dim=5120, approximator_layers=5),
        full_inputs=dict(  # 1024 x 1024
            hidden_states=Normal((1, 4096, 64)), encoder_hidden_states=Normal((1, 512, 4096)),
            timestep=Values([0.75]), img_ids=Ids((64, 64)), txt_ids=Ids((512,), origin=True),
            attention_mask=Values([[1.0] * 60 + [0.0] * 452 + [1.0] * 4096]), return_dict=False),
        tiny=dict(in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
                  num_attention_heads=4, joint_attention_dim=32, axes_dims_rope=(4, 6, 6),
                  approximator_num_channels=32, approximator_hidden_dim=32, approximator_layers=2),
        tiny_inputs=dict(
            hidden_states=Normal((2, 256, 16)), encoder_hidden_states=Normal((2, 16, 32)),
            timestep=Values([0.75, 0.25]), img_ids=Ids((16, 16)), txt_ids=Ids((16,), origin=True),
            attention_mask=Values([[1.0] * 272, [1.0] * 11 + [0.0] * 5 + [1.0] * 256]), return_dict=False),
    ),
}
