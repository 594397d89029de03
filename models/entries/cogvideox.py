"""CogVideoX: text and video in one sequence, rotary tables as an input."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Normal, Rope, Values

ENTRIES = {
    "cogvideox-5b": Entry(
        cls="CogVideoXTransformer3DModel",
        full=dict(num_attention_heads=48, attention_head_dim=64, in_channels=16, out_channels=16,
                  time_embed_dim=512, text_embed_dim=4096, num_layers=42, sample_width=90, sample_height=60,
                  sample_frames=49, patch_size=2, max_text_seq_length=226,
                  use_rotary_positional_embeddings=True),
        full_inputs=dict(  # 720 x 480, 49 frames; a guidance pair
            hidden_states=Normal((2, 13, 16, 60, 90)), encoder_hidden_states=Normal((2, 226, 4096)),
            timestep=Values([750, 750], "int64"), image_rotary_emb=Rope((13, 30, 45), (16, 24, 24)),
            return_dict=False),
        tiny=dict(num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=4,
                  time_embed_dim=32, text_embed_dim=32, num_layers=3, sample_width=16, sample_height=16,
                  sample_frames=13, patch_size=2, max_text_seq_length=16,
                  use_rotary_positional_embeddings=True),
        tiny_inputs=dict(
            hidden_states=Normal((2, 4, 4, 16, 16)), encoder_hidden_states=Normal((2, 16, 32)),
            timestep=Values([750, 250], "int64"), image_rotary_emb=Rope((4, 8, 8), (4, 6, 6)),
            return_dict=False),
    ),
}
