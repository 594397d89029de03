"""HunyuanVideo: two streams, then one; masked text refined first; image to video has a clean frame."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Mask, Normal, Values

ENTRIES = {
    "hunyuanvideo": Entry(
        cls="HunyuanVideoTransformer3DModel",
        full=dict(in_channels=16, out_channels=16, num_attention_heads=24, attention_head_dim=128,
                  num_layers=20, num_single_layers=40, num_refiner_layers=2, guidance_embeds=True,
                  text_embed_dim=4096, pooled_projection_dim=768, rope_axes_dim=(16, 56, 56)),
        full_inputs=dict(  # 1280 x 720, 129 frames
            hidden_states=Normal((1, 16, 33, 90, 160)), timestep=Values([750.0]),
            encoder_hidden_states=Normal((1, 256, 4096)), encoder_attention_mask=Mask(256, (100,)),
            pooled_projections=Normal((1, 768)), guidance=Values([6000.0]), return_dict=False),
        sizes={"540p": dict(hidden_states=Normal((1, 16, 16, 68, 120)))},  # 960 x 544, 61 frames
        tiny=dict(in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=16, num_layers=2,
                  num_single_layers=2, num_refiner_layers=2, guidance_embeds=True, text_embed_dim=32,
                  pooled_projection_dim=24, rope_axes_dim=(4, 6, 6)),
        tiny_inputs=dict(
            hidden_states=Normal((2, 4, 4, 16, 16)), timestep=Values([750.0, 250.0]),
            encoder_hidden_states=Normal((2, 16, 32)), encoder_attention_mask=Mask(16, (16, 11)),
            pooled_projections=Normal((2, 24)), guidance=Values([6000.0, 4000.0]), return_dict=False),
    ),
    "hunyuanvideo-i2v": Entry(
        cls="HunyuanVideoTransformer3DModel",
        full=dict(in_channels=16, out_channels=16, num_attention_heads=24, attention_head_dim=128,
                  num_layers=20, num_single_layers=40, num_refiner_layers=2, guidance_embeds=True,
                  text_embed_dim=4096, pooled_projection_dim=768, rope_axes_dim=(16, 56, 56),
                  image_condition_type="token_replace"),
        full_inputs=dict(  # 1280 x 720, 129 frames
            hidden_states=Normal((1, 16, 33, 90, 160)), timestep=Values([750.0]),
            encoder_hidden_states=Normal((1, 394, 4096)), encoder_attention_mask=Mask(394, (250,)),
            pooled_projections=Normal((1, 768)), guidance=Values([6000.0]), return_dict=False),
        tiny=dict(in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=16, num_layers=2,
                  num_single_layers=2, num_refiner_layers=2, guidance_embeds=True, text_embed_dim=32,
                  pooled_projection_dim=24, rope_axes_dim=(4, 6, 6), image_condition_type="token_replace"),
        tiny_inputs=dict(
            hidden_states=Normal((2, 4, 4, 16, 16)), timestep=Values([750.0, 250.0]),
            encoder_hidden_states=Normal((2, 16, 32)), encoder_attention_mask=Mask(16, (16, 11)),
            pooled_projections=Normal((2, 24)), guidance=Values([6000.0, 4000.0]), return_dict=False),
    ),
}
