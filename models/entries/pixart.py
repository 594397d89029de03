"""PixArt-Sigma: self-attention, masked cross-attention to text, one shared modulation table."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Mask, Normal, Values

ENTRIES = {
    "pixart-sigma": Entry(
        cls="PixArtTransformer2DModel",
        full=dict(num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28,
                  cross_attention_dim=1152, sample_size=128, patch_size=2, interpolation_scale=2,
                  use_additional_conditions=False, caption_channels=4096),
        full_inputs=dict(  # 1024 x 1024; a guidance pair
            hidden_states=Normal((2, 4, 128, 128)), encoder_hidden_states=Normal((2, 300, 4096)),
            encoder_attention_mask=Mask(300, (20, 120)), timestep=Values([750, 750], "int64"),
            added_cond_kwargs=dict(resolution=None, aspect_ratio=None), return_dict=False),
        tiny=dict(num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=3,
                  cross_attention_dim=64, sample_size=32, patch_size=2, interpolation_scale=2,
                  use_additional_conditions=False, caption_channels=32),
        tiny_inputs=dict(
            hidden_states=Normal((2, 4, 32, 32)), encoder_hidden_states=Normal((2, 16, 32)),
            encoder_attention_mask=Mask(16, (16, 11)), timestep=Values([750, 250], "int64"),
            added_cond_kwargs=dict(resolution=None, aspect_ratio=None), return_dict=False),
    ),
}
