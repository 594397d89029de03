"""Helios: like Wan, with three resolutions of history tokens and a timestep per token."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Normal, Values

HISTORY = dict(  # the frames' places: 16 at a quarter of the resolution, 2 at half, the first and the last
    indices_latents_history_long=Values([[*range(1, 17)]], "int64"),
    indices_latents_history_mid=Values([[17, 18]], "int64"),
    indices_latents_history_short=Values([[0, 19]], "int64"))

ENTRIES = {
    "helios": Entry(
        cls="HeliosTransformer3DModel",
        full=dict(patch_size=(1, 2, 2), num_attention_heads=40, attention_head_dim=128, in_channels=16,
                  out_channels=16, text_dim=4096, freq_dim=256, ffn_dim=13824, num_layers=40,
                  rope_dim=(44, 42, 42)),
        full_inputs=dict(  # 640 x 384, a chunk of 33 frames
            hidden_states=Normal((1, 16, 9, 48, 80)), timestep=Values([750.0], "float32"),
            encoder_hidden_states=Normal((1, 512, 4096)),
            indices_hidden_states=Values([[*range(20, 29)]], "int64"), **HISTORY,
            latents_history_short=Normal((1, 16, 2, 48, 80)), latents_history_mid=Normal((1, 16, 2, 48, 80)),
            latents_history_long=Normal((1, 16, 16, 48, 80)), return_dict=False),
        tiny=dict(patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=16, in_channels=4,
                  out_channels=4, text_dim=32, freq_dim=32, ffn_dim=128, num_layers=3, rope_dim=(4, 6, 6),
                  is_amplify_history=True),
        tiny_inputs=dict(  # 128 tokens to denoise and 128 + 16 + 16 of history
            hidden_states=Normal((2, 4, 2, 16, 16)), timestep=Values([750.0, 250.0], "float32"),
            encoder_hidden_states=Normal((2, 16, 32)),
            indices_hidden_states=Values([[20, 21]], "int64"), **HISTORY,
            latents_history_short=Normal((2, 4, 2, 16, 16)), latents_history_mid=Normal((2, 4, 2, 16, 16)),
            latents_history_long=Normal((2, 4, 16, 16, 16)), return_dict=False),
    ),
}
