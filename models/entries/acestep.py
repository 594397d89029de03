"""ACE-Step 1.5: music; banded and full self-attention in turn over grouped heads, cross-attention."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Normal, Values

ENTRIES = {
    "ace-step-1.5": Entry(
        cls="AceStepTransformer1DModel",
        full=dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=24, num_attention_heads=16,
                  num_key_value_heads=8, head_dim=128, in_channels=192, audio_acoustic_hidden_dim=64,
                  patch_size=2, rope_theta=1000000.0, sliding_window=128, encoder_hidden_size=2048),
        full_inputs=dict(  # 60 s at 25 latents a second; a guidance pair
            hidden_states=Normal((2, 1500, 64)), timestep=Values([0.75, 0.75]),
            timestep_r=Values([0.75, 0.75]), encoder_hidden_states=Normal((2, 512, 2048)),
            context_latents=Normal((2, 1500, 128)), return_dict=False),
        tiny=dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
                  num_key_value_heads=2, head_dim=16, in_channels=24, audio_acoustic_hidden_dim=8,
                  patch_size=2, rope_theta=1000000.0, sliding_window=32, encoder_hidden_size=32),
        tiny_inputs=dict(
            hidden_states=Normal((2, 512, 8)), timestep=Values([0.75, 0.25]), timestep_r=Values([0.5, 0.125]),
            encoder_hidden_states=Normal((2, 16, 32)), context_latents=Normal((2, 512, 16)),
            return_dict=False),
    ),
}
