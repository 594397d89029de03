"""Nucleus-Image: image queries only, grouped heads, experts that choose their tokens (three dense blocks first)."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Mask, Normal, Values

ENTRIES = {
    "nucleus-image": Entry(
        cls="NucleusMoEImageTransformer2DModel",
        tiny=dict(patch_size=2, in_channels=16, out_channels=4, num_layers=6, attention_head_dim=16,
                  num_attention_heads=4, num_key_value_heads=2, joint_attention_dim=32,
                  axes_dims_rope=(4, 6, 6), num_experts=4, moe_intermediate_dim=32, capacity_factors=2.0),
        tiny_inputs=dict(
            hidden_states=Normal((2, 256, 16)), encoder_hidden_states=Normal((2, 16, 32)),
            encoder_hidden_states_mask=Mask(16, (16, 11)), timestep=Values([0.75, 0.25]),
            img_shapes=[(1, 16, 16), (1, 16, 16)], attention_kwargs=None, return_dict=False),
    ),
}
