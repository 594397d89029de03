"""Kandinsky 5 and 6: text blocks, then video blocks with cross-attention; 6 makes audio in them too.

The super-resolution model of 6 has sparse attention: blocks of 64 tokens that their means choose.
"""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Mask, Normal, Values

FRAMES, TAIL, SIDE, TEXT = (Values([*ids], "int64") for ids in (range(4), (0, 1, 2, 0), range(8), range(16)))

ENTRIES = {
    "kandinsky-5": Entry(
        cls="Kandinsky5Transformer3DModel",
        tiny=dict(in_visual_dim=4, in_text_dim=32, in_text_dim2=24, time_dim=32, out_visual_dim=4,
                  model_dim=64, ff_dim=128, num_text_blocks=2, num_visual_blocks=3, axes_dims=(4, 6, 6),
                  visual_cond=True),
        tiny_inputs=dict(
            hidden_states=Normal((2, 4, 16, 16, 9)), encoder_hidden_states=Normal((2, 16, 32)),
            timestep=Values([750.0, 250.0]), pooled_projections=Normal((2, 24)),
            visual_rope_pos=[FRAMES, SIDE, SIDE], text_rope_pos=TEXT, scale_factor=(1.0, 2.0, 2.0),
            return_dict=False),
    ),
    "kandinsky-6": Entry(  # with a clean frame at the end, at the first one's position
        cls="Kandinsky6Transformer3DModel",
        tiny=dict(in_visual_dim=4, out_visual_dim=4, in_text_dim=32, in_text_dim2=24, time_dim=32,
                  model_dim=64, ff_dim=128, num_text_blocks=2, num_visual_blocks=3, axes_dims=(4, 6, 6),
                  visual_cond=True, in_audio_dim=6, out_audio_dim=6, ca_rope=True, cross_gates=True,
                  fix_modulation=True, visual_token_type_num_embeddings=2),
        tiny_inputs=dict(
            hidden_states=Normal((2, 4, 16, 16, 9)), audio_hidden_states=Normal((2, 24, 6)),
            encoder_hidden_states=Normal((2, 16, 32)), pooled_projections=Normal((2, 24)),
            timestep=Values([750.0, 250.0], "float32"), visual_rope_pos=(TAIL, SIDE, SIDE),
            encoder_attention_mask=Mask(16, (16, 11), "bool"),
            visual_token_type_ids=Values([[0, 0, 0, 1]] * 2, "int64"), return_dict=False),
    ),
    "kandinsky-6-sr": Entry(
        cls="Kandinsky6SRTransformer3DModel",
        tiny=dict(in_visual_dim=4, out_visual_dim=8, time_dim=32, model_dim=64, ff_dim=128,
                  num_visual_blocks=3, axes_dims=(4, 6, 6), nabla_window=(3, 1, 1)),
        tiny_inputs=dict(
            hidden_states=Normal((2, 4, 8, 16, 9)), timestep=Values([750.0, 250.0], "float32"),
            return_dict=False),
    ),
}
