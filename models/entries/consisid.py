"""ConsisID: CogVideoX with a face: a resampler makes its tokens, blocks alternate with attention to them."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Normal, Rope, Values

ENTRIES = {
    "consisid": Entry(
        cls="ConsisIDTransformer3DModel",
        tiny=dict(num_attention_heads=4, attention_head_dim=12, in_channels=8, out_channels=4,
                  time_embed_dim=32, text_embed_dim=32, num_layers=4, sample_width=16, sample_height=16,
                  sample_frames=13, patch_size=2, max_text_seq_length=16,
                  use_rotary_positional_embeddings=True, is_train_face=True, cross_attn_interval=2,
                  cross_attn_dim_head=16, cross_attn_num_heads=4, LFE_id_dim=24, LFE_vit_dim=16, LFE_depth=2,
                  LFE_dim_head=8, LFE_num_heads=4, LFE_num_id_token=2, LFE_num_querie=8, LFE_output_dim=32,
                  LFE_ff_mult=2, LFE_num_scale=2),
        tiny_inputs=dict(
            hidden_states=Normal((2, 4, 8, 16, 16)), encoder_hidden_states=Normal((2, 16, 32)),
            timestep=Values([750, 250], "int64"), image_rotary_emb=Rope((4, 8, 8), (4, 4, 4)),
            id_cond=Normal((2, 24)), id_vit_hidden=[Normal((2, 9, 16)), Normal((2, 9, 16))],
            return_dict=False),
    ),
}
