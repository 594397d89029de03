"""HunyuanDiT 1.2: long skips from the first half to the second, two masked texts, rotary tables given."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Mask, Normal, Rope, Values

ENTRIES = {
    "hunyuandit": Entry(
        cls="HunyuanDiT2DModel",
        full=dict(num_attention_heads=16, attention_head_dim=88, in_channels=4, patch_size=2, sample_size=128,
                  hidden_size=1408, num_layers=40, mlp_ratio=4.3637,
                  use_style_cond_and_image_meta_size=False),
        full_inputs=dict(  # 1024 x 1024; a guidance pair
            hidden_states=Normal((2, 4, 128, 128)), timestep=Values([750.0, 750.0]),
            encoder_hidden_states=Normal((2, 77, 1024)), text_embedding_mask=Mask(77, (2, 40)),
            encoder_hidden_states_t5=Normal((2, 256, 2048)), text_embedding_mask_t5=Mask(256, (1, 60)),
            image_meta_size=Values([[1024.0, 1024.0, 1024.0, 1024.0, 0.0, 0.0]] * 2),
            style=Values([0, 0], "int64"), image_rotary_emb=Rope((64, 64), (44, 44), step=0.5, order=(1, 0)),
            return_dict=False),
        tiny=dict(num_attention_heads=4, attention_head_dim=16, in_channels=4, patch_size=2, sample_size=32,
                  hidden_size=64, num_layers=6, mlp_ratio=2.0, use_style_cond_and_image_meta_size=False,
                  cross_attention_dim=32, cross_attention_dim_t5=16, pooled_projection_dim=24, text_len=6,
                  text_len_t5=10),
        tiny_inputs=dict(
            hidden_states=Normal((2, 4, 32, 32)), timestep=Values([750.0, 250.0]),
            encoder_hidden_states=Normal((2, 6, 32)), text_embedding_mask=Mask(6, (6, 4)),
            encoder_hidden_states_t5=Normal((2, 10, 16)), text_embedding_mask_t5=Mask(10, (10, 7)),
            image_meta_size=Values([[256.0, 256.0, 256.0, 256.0, 0.0, 0.0]] * 2),
            style=Values([0, 0], "int64"), image_rotary_emb=Rope((16, 16), (8, 8), order=(1, 0)),
            return_dict=False),
    ),
}
