"""FLUX.2: shared modulations; single blocks with one fused projection; four position axes."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Normal, Values

ENTRIES = {
    "flux.2-dev": Entry(
        cls="Flux2Transformer2DModel",
        full=dict(in_channels=128, num_layers=8, num_single_layers=48, attention_head_dim=128,
                  num_attention_heads=48, joint_attention_dim=15360, timestep_guidance_channels=256,
                  mlp_ratio=3.0, axes_dims_rope=(32, 32, 32, 32), rope_theta=2000, guidance_embeds=True),
        full_inputs=dict(  # 1024 x 1024
            hidden_states=Normal((1, 4096, 128)), encoder_hidden_states=Normal((1, 512, 15360)),
            timestep=Values([0.75]), guidance=Values([4.0], "float32"),
            img_ids=Values([[[0, i // 64, i % 64, 0] for i in range(4096)]], "int64"),
            txt_ids=Values([[[0, 0, 0, i] for i in range(512)]], "int64"), return_dict=False),
        tiny=dict(in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
                  num_attention_heads=4, joint_attention_dim=32, timestep_guidance_channels=32, mlp_ratio=3.0,
                  axes_dims_rope=(4, 4, 4, 4), rope_theta=2000, guidance_embeds=True),
        tiny_inputs=dict(
            hidden_states=Normal((2, 256, 16)), encoder_hidden_states=Normal((2, 16, 32)),
            timestep=Values([0.75, 0.25]), guidance=Values([4.0, 2.0], "float32"),
            img_ids=Values([[[0, i // 16, i % 16, 0] for i in range(256)]] * 2, "int64"),
            txt_ids=Values([[[0, 0, 0, i] for i in range(16)]] * 2, "int64"), return_dict=False),
    ),
}
