"""FLUX.1: two streams, then one; rotary positions; distilled guidance."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Ids, Normal, Values

ENTRIES = {
    "flux.1-dev": Entry(
        cls="FluxTransformer2DModel",
        full=dict(in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128,
                  num_attention_heads=24, joint_attention_dim=4096, pooled_projection_dim=768,
                  guidance_embeds=True, axes_dims_rope=(16, 56, 56)),
        full_inputs=dict(  # 1024 x 1024
            hidden_states=Normal((1, 4096, 64)), encoder_hidden_states=Normal((1, 512, 4096)),
            pooled_projections=Normal((1, 768)), timestep=Values([0.5]), guidance=Values([4.0], "float32"),
            img_ids=Ids((64, 64)), txt_ids=Ids((512,), origin=True), return_dict=False),
        sizes={"2048px": dict(hidden_states=Normal((1, 16384, 64)), img_ids=Ids((128, 128)))},
        tiny=dict(in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
                  num_attention_heads=4, joint_attention_dim=32, pooled_projection_dim=24,
                  guidance_embeds=True, axes_dims_rope=(4, 6, 6)),
        tiny_inputs=dict(
            hidden_states=Normal((2, 256, 16)), encoder_hidden_states=Normal((2, 16, 32)),
            pooled_projections=Normal((2, 24)), timestep=Values([0.75, 0.25]),
            guidance=Values([3.5, 2.0], "float32"), img_ids=Ids((16, 16)), txt_ids=Ids((16,), origin=True),
            return_dict=False),
    ),
}
