"""Stable Audio: one global token before the latents, grouped cross-attention; version 3 has memory tokens and
differential attention."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Mask, Normal, Rope, Values

ENTRIES = {
    "stable-audio-open": Entry(
        cls="StableAudioDiTModel",
        full=dict(sample_size=1024, in_channels=64, num_layers=24, attention_head_dim=64,
                  num_attention_heads=24, num_key_value_attention_heads=12, out_channels=64,
                  cross_attention_dim=768, time_proj_dim=256, global_states_input_dim=1536,
                  cross_attention_input_dim=768),
        full_inputs=dict(  # 47 seconds; a guidance pair, one timestep for both; text and two duration tokens
            hidden_states=Normal((2, 64, 1024)), timestep=Values([0.75]),
            encoder_hidden_states=Normal((2, 130, 768)), global_hidden_states=Normal((2, 1, 1536)),
            rotary_embedding=Rope((1025,), (32,), layout="halves"), return_dict=False),
        tiny=dict(sample_size=256, in_channels=8, num_layers=3, attention_head_dim=16, num_attention_heads=4,
                  num_key_value_attention_heads=2, out_channels=8, cross_attention_dim=32, time_proj_dim=16,
                  global_states_input_dim=24, cross_attention_input_dim=32),
        tiny_inputs=dict(
            hidden_states=Normal((2, 8, 256)), timestep=Values([0.75, 0.25]),
            encoder_hidden_states=Normal((2, 16, 32)), global_hidden_states=Normal((2, 1, 24)),
            rotary_embedding=Rope((257,), (8,), layout="halves"), return_dict=False),
    ),
    "stable-audio-3": Entry(  # inpainting: a local condition
        cls="StableAudio3DiTModel",
        tiny=dict(io_channels=8, embed_dim=64, depth=3, num_heads=4, cond_token_dim=32, global_cond_dim=24,
                  local_add_cond_dim=9, timestep_features_dim=32, ff_mult=2.0, num_memory_tokens=8),
        tiny_inputs=dict(
            hidden_states=Normal((2, 8, 256)), timestep=Values([0.75, 0.25], "float32"),
            encoder_hidden_states=Normal((2, 16, 32)), global_hidden_states=Normal((2, 24)),
            encoder_attention_mask=Mask(16, (16, 11)), local_add_cond=Normal((2, 9, 256)), return_dict=False),
    ),
}
