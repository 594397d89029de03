"""LongCat: an image model of two streams, then one; an audio model with masks on both sequences."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Mask, Normal, Values

TEXT = [[0, i, i] for i in range(16)]
IMAGE = [[1, 16 + h, 16 + w] for h in range(16) for w in range(16)]

ENTRIES = {
    "longcat-image": Entry(
        cls="LongCatImageTransformer2DModel",
        full=dict(in_channels=64, num_layers=10, num_single_layers=20, attention_head_dim=128,
                  num_attention_heads=24, joint_attention_dim=3584, pooled_projection_dim=3584,
                  axes_dims_rope=[16, 56, 56]),
        full_inputs=dict(  # 1024 x 1024
            hidden_states=Normal((1, 4096, 64)), encoder_hidden_states=Normal((1, 512, 3584)),
            timestep=Values([0.75]), guidance=None,
            img_ids=Values([[1, 512 + h, 512 + w] for h in range(64) for w in range(64)], "float32"),
            txt_ids=Values([[0, i, i] for i in range(512)], "float32"), return_dict=False),
        tiny=dict(in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
                  num_attention_heads=4, joint_attention_dim=32, pooled_projection_dim=32,
                  axes_dims_rope=[4, 6, 6]),
        tiny_inputs=dict(
            hidden_states=Normal((2, 256, 16)), encoder_hidden_states=Normal((2, 16, 32)),
            timestep=Values([0.75, 0.25]), guidance=None, img_ids=Values(IMAGE, "float32"),
            txt_ids=Values(TEXT, "float32"), return_dict=False),
    ),
    "longcat-audiodit": Entry(
        cls="LongCatAudioDiTTransformer",
        tiny=dict(dit_dim=64, dit_depth=3, dit_heads=4, dit_text_dim=32, latent_dim=8, ff_mult=2.0),
        tiny_inputs=dict(
            hidden_states=Normal((2, 256, 8)), encoder_hidden_states=Normal((2, 16, 32)),
            encoder_attention_mask=Mask(16, (16, 11), "bool"), timestep=Values([0.75, 0.25]),
            attention_mask=Mask(256, (256, 200), "bool"), latent_cond=Normal((2, 256, 8)),
            return_dict=False),
    ),
}
