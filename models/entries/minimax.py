"""MiniMax H3: text, audio and video rows in one sequence, put and taken by index, modulated per kind of row.

Music 3: an audio model whose condition is concatenated to its channels, and the causal depth decoder of its
codes (no denoiser: no latents, no timestep).
"""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Normal, Values

POSITIONS = [  # [text | a conditioning frame | audio | video]
    *([i, 0, 0] for i in range(16)), *([16, 4 * h, 4 * w] for h in range(4) for w in range(8)),
    *([16 + i, 0, 28 * side] for side in range(2) for i in range(16)),
    *([16 + 5 * f, 4 * h, 4 * w] for f in range(6) for h in range(4) for w in range(8))]

ENTRIES = {
    "minimax-h3": Entry(
        cls="MiniMaxH3Transformer3DModel",
        tiny=dict(num_attention_heads=4, attention_head_dim=16, hidden_size=48, num_layers=3,
                  num_refiner_layers=2, ffn_dim=96, in_channels=4, audio_in_channels=6, text_dim=32,
                  freq_dim=32, time_embed_hidden_dim=48, time_embed_dim=24, rope_freq_dim=2),
        tiny_inputs=dict(  # layout and timesteps are one for the whole batch
            hidden_states=Normal((2, 224, 16)), audio_hidden_states=Normal((2, 32, 6)),
            encoder_hidden_states=Normal((2, 16, 32)), timestep=Values([750.0, 10.0], "float32"),
            timestep_indices=Values([0] * 16 + [1] * 32 + [0] * 224, "int64"),
            token_tags=Values([1] * 16 + [0] * 32 + [2] * 32 + [0] * 192, "int64"),
            position_ids=Values(POSITIONS, "float64"),
            video_indices=Values([*range(16, 48), *range(80, 272)], "int64"),
            audio_indices=Values([*range(48, 80)], "int64"), text_indices=Values([*range(16)], "int64"),
            return_dict=False),
    ),
    "minimax-music-3": Entry(
        cls="MiniMaxMusic3Transformer1DModel",
        tiny=dict(in_channels=8, condition_dim=32, num_layers=3, num_attention_heads=4, attention_head_dim=16,
                  ff_inner_dim=128, rotary_dim=8, fourier_embedding_dim=32),
        tiny_inputs=dict(
            hidden_states=Normal((2, 8, 256)), timestep=Values([0.75, 0.25]),
            encoder_hidden_states=Normal((2, 256, 32)), return_dict=False),
    ),
    "minimax-music-3-depth": Entry(
        cls="MiniMaxMusic3RVQDepthDecoder", no_denoiser="autoregressive over the codebooks of one audio frame",
        tiny=dict(hidden_size=64, num_layers=3, num_attention_heads=4, intermediate_size=96,
                  audio_vocab_size=32, num_codebooks=4, max_position_embeddings=16),
        tiny_inputs=dict(inputs_embeds=Normal((2, 16, 64))),
    ),
}
