"""Motif-Video: two streams, one stream, then decoder blocks joining the first embedding with the encoded video."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Mask, Normal, Values

ENTRIES = {
    "motif-video": Entry(  # image to video: image tokens precede the text
        cls="MotifVideoTransformer3DModel",
        tiny=dict(in_channels=9, out_channels=4, num_attention_heads=4, attention_head_dim=16, num_layers=2,
                  num_single_layers=4, num_decoder_layers=2, mlp_ratio=2.0, text_embed_dim=32,
                  image_embed_dim=24, rope_axes_dim=(4, 6, 6), enable_text_cross_attention_dual=True,
                  enable_text_cross_attention_single=True),
        tiny_inputs=dict(
            hidden_states=Normal((2, 9, 4, 16, 16)), timestep=Values([750.0, 250.0], "float32"),
            encoder_hidden_states=Normal((2, 16, 32)), encoder_attention_mask=Mask(16, (16, 11), "bool"),
            image_embeds=Normal((2, 8, 24)), attention_kwargs=None, return_dict=False),
    ),
}
