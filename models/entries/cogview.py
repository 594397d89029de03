"""CogView 3 Plus and 4: image and text share weights, sizes are conditions; 4 has rotary positions."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Mask, Normal, Values

ENTRIES = {
    "cogview3-plus-3b": Entry(
        cls="CogView3PlusTransformer2DModel",
        full=dict(patch_size=2, in_channels=16, num_layers=30, attention_head_dim=40, num_attention_heads=64,
                  out_channels=16, text_embed_dim=4096, time_embed_dim=512, condition_dim=256,
                  pos_embed_max_size=128, sample_size=128),
        full_inputs=dict(  # 1024 x 1024; a guidance pair
            hidden_states=Normal((2, 16, 128, 128)), encoder_hidden_states=Normal((2, 224, 4096)),
            timestep=Values([750, 750], "int64"), original_size=Values([[1024.0, 1024.0]] * 2),
            target_size=Values([[1024.0, 1024.0]] * 2), crop_coords=Values([[0.0, 0.0]] * 2),
            return_dict=False),
        tiny=dict(patch_size=2, in_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=4,
                  out_channels=4, text_embed_dim=32, time_embed_dim=32, condition_dim=16,
                  pos_embed_max_size=20, sample_size=32),
        tiny_inputs=dict(
            hidden_states=Normal((2, 4, 32, 32)), encoder_hidden_states=Normal((2, 16, 32)),
            timestep=Values([750, 250], "int64"), original_size=Values([[256.0, 256.0], [128.0, 256.0]]),
            target_size=Values([[256.0, 256.0]] * 2), crop_coords=Values([[0.0, 0.0], [8.0, 0.0]]),
            return_dict=False),
    ),
    "cogview4-6b": Entry(
        cls="CogView4Transformer2DModel",
        full=dict(patch_size=2, in_channels=16, num_layers=28, attention_head_dim=128, num_attention_heads=32,
                  out_channels=16, text_embed_dim=4096, time_embed_dim=512, condition_dim=256,
                  pos_embed_max_size=128, sample_size=128, rope_axes_dim=(256, 256)),
        full_inputs=dict(  # 1024 x 1024; the pipeline passes no mask
            hidden_states=Normal((1, 16, 128, 128)), encoder_hidden_states=Normal((1, 1024, 4096)),
            timestep=Values([750.0], "float32"), original_size=Values([[1024.0, 1024.0]]),
            target_size=Values([[1024.0, 1024.0]]), crop_coords=Values([[0.0, 0.0]]), attention_mask=None,
            return_dict=False),
        tiny=dict(patch_size=2, in_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=4,
                  out_channels=4, text_embed_dim=32, time_embed_dim=32, condition_dim=16,
                  pos_embed_max_size=20, sample_size=32, rope_axes_dim=(32, 32)),
        tiny_inputs=dict(
            hidden_states=Normal((2, 4, 32, 32)), encoder_hidden_states=Normal((2, 16, 32)),
            timestep=Values([750.0, 250.0], "float32"),
            original_size=Values([[256.0, 256.0], [128.0, 256.0]]), target_size=Values([[256.0, 256.0]] * 2),
            crop_coords=Values([[0.0, 0.0], [8.0, 0.0]]), attention_mask=Mask(16, (16, 11)),
            return_dict=False),
    ),
}
