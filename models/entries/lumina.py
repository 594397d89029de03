"""Lumina: Next has gated cross-attention; 2 packs valid text and image of each sample into one sequence."""
# fmt: off

from __future__ import annotations

from ..specs import ComplexRope, Entry, Mask, Normal, Values

ENTRIES = {
    "lumina-next": Entry(
        cls="LuminaNextDiT2DModel",
        full=dict(sample_size=128, patch_size=2, in_channels=4, hidden_size=2304, num_layers=24,
                  num_attention_heads=32, num_kv_heads=8, cross_attention_dim=2048),
        full_inputs=dict(  # 1024 x 1024; a guidance pair
            hidden_states=Normal((2, 4, 128, 128)), timestep=Values([0.25, 0.25], "float32"),
            encoder_hidden_states=Normal((2, 256, 2048)), encoder_mask=Mask(256, (1, 100)),
            image_rotary_emb=ComplexRope((384, 384), 72), cross_attention_kwargs={}, return_dict=False),
        tiny=dict(sample_size=32, patch_size=2, in_channels=4, hidden_size=64, num_layers=3,
                  num_attention_heads=4, num_kv_heads=2, cross_attention_dim=32),
        tiny_inputs=dict(
            hidden_states=Normal((2, 4, 32, 32)), timestep=Values([0.25, 0.75], "float32"),
            encoder_hidden_states=Normal((2, 16, 32)), encoder_mask=Mask(16, (16, 11)),
            image_rotary_emb=ComplexRope((24, 24), 16), cross_attention_kwargs={}, return_dict=False),
    ),
    "lumina-2": Entry(
        cls="Lumina2Transformer2DModel",
        full=dict(sample_size=128, patch_size=2, in_channels=16, hidden_size=2304, num_layers=26,
                  num_refiner_layers=2, num_attention_heads=24, num_kv_heads=8, axes_dim_rope=(32, 32, 32),
                  axes_lens=(300, 512, 512), cap_feat_dim=2304),
        full_inputs=dict(  # 1024 x 1024
            hidden_states=Normal((1, 16, 128, 128)), timestep=Values([0.25], "float32"),
            encoder_hidden_states=Normal((1, 256, 2304)), encoder_attention_mask=Mask(256, (100,)),
            return_dict=False),
        tiny=dict(sample_size=32, patch_size=2, in_channels=4, hidden_size=64, num_layers=3,
                  num_refiner_layers=2, num_attention_heads=4, num_kv_heads=2, axes_dim_rope=(4, 6, 6),
                  axes_lens=(64, 32, 32), cap_feat_dim=32),
        tiny_inputs=dict(
            hidden_states=Normal((2, 4, 32, 32)), timestep=Values([0.25, 0.75], "float32"),
            encoder_hidden_states=Normal((2, 16, 32)), encoder_attention_mask=Mask(16, (16, 11)),
            return_dict=False),
    ),
}
