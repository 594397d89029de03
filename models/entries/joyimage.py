"""JoyImage Edit: two streams; reference images and the one to make as items of one sequence.

Edit Plus takes packed patches, of a different number in each sample, with a mask.
"""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Mask, Normal, Values

ENTRIES = {
    "joyimage-edit": Entry(
        cls="JoyImageEditTransformer3DModel",
        tiny=dict(patch_size=[1, 2, 2], in_channels=4, hidden_size=64, num_attention_heads=4, text_dim=32,
                  mlp_width_ratio=2.0, num_layers=3, rope_dim_list=[4, 6, 6]),
        tiny_inputs=dict(
            hidden_states=Normal((2, 2, 4, 1, 16, 32)), timestep=Values([750.0, 250.0], "float32"),
            encoder_hidden_states=Normal((2, 16, 32)), return_dict=False),
    ),
    "joyimage-edit-plus": Entry(
        cls="JoyImageEditPlusTransformer3DModel",
        tiny=dict(patch_size=[1, 2, 2], in_channels=4, hidden_size=64, num_attention_heads=4, text_dim=32,
                  mlp_width_ratio=2.0, num_layers=3, rope_dim_list=[4, 6, 6]),
        tiny_inputs=dict(
            hidden_states=Normal((2, 256, 4, 1, 2, 2)), timestep=Values([750.0, 250.0], "float32"),
            encoder_hidden_states=Normal((2, 16, 32)), encoder_hidden_states_mask=Mask(16, (16, 11)),
            shape_list=[[(1, 8, 16), (1, 8, 16)], [(1, 8, 16), (1, 8, 8)]], return_dict=False),
    ),
}
