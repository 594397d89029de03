"""HunyuanVideo 1.5: two streams; two masked texts and image tokens, the valid ones of all moved to the front.

The model reads whether `image_embeds` is all zeros: text to video (then masked), or image to video.
"""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Mask, Normal, Values

TINY = dict(in_channels=9, out_channels=4, num_attention_heads=4, attention_head_dim=16, num_layers=3,
            num_refiner_layers=2, patch_size=1, patch_size_t=1, text_embed_dim=32, text_embed_2_dim=24,
            image_embed_dim=20, rope_axes_dim=(4, 6, 6))
TINY_INPUTS = dict(
    hidden_states=Normal((2, 9, 4, 8, 8)), timestep=Values([750.0, 250.0]),
    encoder_hidden_states=Normal((2, 8, 32)), encoder_attention_mask=Mask(8, (8, 5)),
    encoder_hidden_states_2=Normal((2, 4, 24)), encoder_attention_mask_2=Mask(4, (4, 2)), return_dict=False)

ENTRIES = {
    "hunyuanvideo-1.5": Entry(
        cls="HunyuanVideo15Transformer3DModel", tiny=TINY,
        tiny_inputs=dict(**TINY_INPUTS, image_embeds=Values([[[0.0] * 20] * 4] * 2)),
    ),
    "hunyuanvideo-1.5-i2v": Entry(
        cls="HunyuanVideo15Transformer3DModel", tiny=TINY,
        tiny_inputs=dict(**TINY_INPUTS, image_embeds=Normal((2, 4, 20))),
    ),
}
