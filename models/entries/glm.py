"""GLM-Image: prior tokens (dropped by a mask) added to the image, glyph text before it."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Integers, Mask, Normal, Values

ENTRIES = {
    "glm-image": Entry(
        cls="GlmImageTransformer2DModel",
        full=dict(patch_size=2, in_channels=16, out_channels=16, num_layers=30, attention_head_dim=128,
                  num_attention_heads=32, text_embed_dim=1472, time_embed_dim=512, condition_dim=256,
                  prior_vq_quantizer_codebook_size=16384),
        full_inputs=dict(  # 1024 x 1024; the pipeline passes no mask
            hidden_states=Normal((1, 16, 128, 128)), encoder_hidden_states=Normal((1, 64, 1472)),
            prior_token_id=Integers((1, 4096), 16384), prior_token_drop=Values([[False] * 4096], "bool"),
            timestep=Values([749.0], "float32"), target_size=Values([[1024.0, 1024.0]]),
            crop_coords=Values([[0.0, 0.0]]), attention_mask=None, return_dict=False),
        tiny=dict(patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16,
                  num_attention_heads=4, text_embed_dim=32, time_embed_dim=32, condition_dim=16,
                  prior_vq_quantizer_codebook_size=64),
        tiny_inputs=dict(
            hidden_states=Normal((2, 4, 32, 32)), encoder_hidden_states=Normal((2, 16, 32)),
            prior_token_id=Integers((2, 256), 64),
            prior_token_drop=Values([[False] * 256, [True] * 256], "bool"),
            timestep=Values([749.0, 249.0], "float32"), target_size=Values([[256.0, 256.0], [128.0, 256.0]]),
            crop_coords=Values([[0.0, 0.0], [8.0, 0.0]]), attention_mask=Mask(16, (16, 11)),
            return_dict=False),
    ),
}
