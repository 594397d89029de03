"""HunyuanImage 2.1: two streams, then one; two masked texts, the valid tokens of both moved to the front."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Mask, Normal, Values

ENTRIES = {
    "hunyuanimage-2.1": Entry(
        cls="HunyuanImageTransformer2DModel",
        full=dict(in_channels=64, out_channels=64, num_attention_heads=28, attention_head_dim=128,
                  num_layers=20, num_single_layers=40, num_refiner_layers=2, patch_size=(1, 1),
                  guidance_embeds=False, use_meanflow=False, text_embed_dim=3584, text_embed_2_dim=1472,
                  rope_axes_dim=(64, 64)),
        full_inputs=dict(  # 2048 x 2048
            hidden_states=Normal((1, 64, 64, 64)), timestep=Values([750.0]), timestep_r=None, guidance=None,
            encoder_hidden_states=Normal((1, 1000, 3584)), encoder_attention_mask=Mask(1000, (200,)),
            encoder_hidden_states_2=Normal((1, 128, 1472)), encoder_attention_mask_2=Mask(128, (20,)),
            return_dict=False),
        tiny=dict(in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=16, num_layers=2,
                  num_single_layers=2, num_refiner_layers=2, patch_size=(1, 1), guidance_embeds=True,
                  use_meanflow=True, text_embed_dim=32, text_embed_2_dim=24, rope_axes_dim=(8, 8)),
        tiny_inputs=dict(  # as the distilled checkpoint, which adds guidance and a second timestep
            hidden_states=Normal((2, 8, 16, 16)), timestep=Values([750.0, 250.0]),
            timestep_r=Values([700.0, 200.0]), guidance=Values([3500.0, 2000.0]),
            encoder_hidden_states=Normal((2, 10, 32)), encoder_attention_mask=Mask(10, (10, 7)),
            encoder_hidden_states_2=Normal((2, 6, 24)), encoder_attention_mask_2=Mask(6, (6, 4)),
            return_dict=False),
    ),
}
