"""Qwen-Image: two streams throughout, masked joint attention, complex rotary tables from `img_shapes`."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Mask, Normal, Values

ENTRIES = {
    "qwen-image": Entry(
        cls="QwenImageTransformer2DModel",
        full=dict(patch_size=2, in_channels=64, out_channels=16, num_layers=60, attention_head_dim=128,
                  num_attention_heads=24, joint_attention_dim=3584, axes_dims_rope=(16, 56, 56)),
        full_inputs=dict(  # 1024 x 1024; the pipeline passes no mask unless prompts differ in length
            hidden_states=Normal((1, 4096, 64)), encoder_hidden_states=Normal((1, 512, 3584)),
            encoder_hidden_states_mask=None, timestep=Values([0.75]), img_shapes=[[(1, 64, 64)]],
            return_dict=False),
        tiny=dict(patch_size=2, in_channels=16, out_channels=4, num_layers=3, attention_head_dim=16,
                  num_attention_heads=4, joint_attention_dim=32, axes_dims_rope=(4, 6, 6)),
        tiny_inputs=dict(
            hidden_states=Normal((2, 256, 16)), encoder_hidden_states=Normal((2, 16, 32)),
            encoder_hidden_states_mask=Mask(16, (16, 11)), timestep=Values([0.75, 0.25]),
            img_shapes=[[(1, 16, 16)], [(1, 16, 16)]], return_dict=False),
    ),
}
