"""FramePack: HunyuanVideo with three resolutions of history tokens and the tokens of an image encoder."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Mask, Normal, Values

HISTORY = dict(  # the frames' places: 16 at a quarter of the resolution, 2 at half, the first and the last
    indices_latents_history_4x=Values([*range(1, 17)], "int64"),
    indices_latents_history_2x=Values([17, 18], "int64"), indices_latents_clean=Values([0, 19], "int64"))

ENTRIES = {
    "framepack-i2v": Entry(
        cls="HunyuanVideoFramepackTransformer3DModel",
        full=dict(in_channels=16, out_channels=16, num_attention_heads=24, attention_head_dim=128,
                  num_layers=20, num_single_layers=40, num_refiner_layers=2, guidance_embeds=True,
                  text_embed_dim=4096, pooled_projection_dim=768, rope_axes_dim=(16, 56, 56),
                  has_image_proj=True, image_proj_dim=1152, has_clean_x_embedder=True),
        full_inputs=dict(  # 832 x 480, a window of 33 frames
            hidden_states=Normal((1, 16, 9, 60, 104)), timestep=Values([750.0], "float32"),
            encoder_hidden_states=Normal((1, 256, 4096)), encoder_attention_mask=Mask(256, (100,)),
            pooled_projections=Normal((1, 768)), image_embeds=Normal((1, 729, 1152)),
            guidance=Values([6000.0]), indices_latents=Values([*range(20, 29)], "int64"), **HISTORY,
            latents_clean=Normal((1, 16, 2, 60, 104)), latents_history_2x=Normal((1, 16, 2, 60, 104)),
            latents_history_4x=Normal((1, 16, 16, 60, 104)), return_dict=False),
        tiny=dict(in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=16, num_layers=2,
                  num_single_layers=2, num_refiner_layers=2, guidance_embeds=True, text_embed_dim=32,
                  pooled_projection_dim=24, rope_axes_dim=(4, 6, 6), has_image_proj=True, image_proj_dim=20,
                  has_clean_x_embedder=True),
        tiny_inputs=dict(  # 128 tokens to denoise and 128 + 16 + 16 of history
            hidden_states=Normal((2, 4, 2, 16, 16)), timestep=Values([750.0, 250.0], "float32"),
            encoder_hidden_states=Normal((2, 8, 32)), encoder_attention_mask=Mask(8, (8, 5)),
            pooled_projections=Normal((2, 24)), image_embeds=Normal((2, 8, 20)),
            guidance=Values([6000.0, 4000.0]), indices_latents=Values([20, 21], "int64"), **HISTORY,
            latents_clean=Normal((2, 4, 2, 16, 16)), latents_history_2x=Normal((2, 4, 2, 16, 16)),
            latents_history_4x=Normal((2, 4, 16, 16, 16)), return_dict=False),
    ),
}
