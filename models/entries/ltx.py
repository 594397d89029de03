"""LTX-Video: self-attention and masked cross-attention, positions in pixels and seconds.

LTX-2 denoises video and audio in the same blocks, with attention between them; 2.3 adds gates, a modulated
text and perturbed attention.
"""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Mask, Normal, Values

FRAMES, SIDES = range(4), range(8)
VIDEO_COORDS = [[[f / 3, (f + 1) / 3] for f in FRAMES for _ in SIDES for _ in SIDES],
                [[32 * h, 32 * h + 32] for _ in FRAMES for h in SIDES for _ in SIDES],
                [[32 * w, 32 * w + 32] for _ in FRAMES for _ in SIDES for w in SIDES]]
AUDIO_COORDS = [[[i / 25, (i + 1) / 25] for i in range(24)]]

ENTRIES = {
    "ltx-video": Entry(
        cls="LTXVideoTransformer3DModel",
        full=dict(in_channels=128, out_channels=128, num_attention_heads=32, attention_head_dim=64,
                  cross_attention_dim=2048, num_layers=28, caption_channels=4096),
        full_inputs=dict(  # 704 x 480, 161 frames; a guidance pair
            hidden_states=Normal((2, 6930, 128)), encoder_hidden_states=Normal((2, 128, 4096)),
            timestep=Values([750.0, 750.0], "float32"), encoder_attention_mask=Mask(128, (10, 100), "bool"),
            num_frames=21, height=15, width=22, rope_interpolation_scale=(8 / 25, 32, 32),
            return_dict=False),
        tiny=dict(in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=16,
                  cross_attention_dim=64, num_layers=3, caption_channels=32),
        tiny_inputs=dict(
            hidden_states=Normal((2, 256, 8)), encoder_hidden_states=Normal((2, 16, 32)),
            timestep=Values([750.0, 250.0], "float32"), encoder_attention_mask=Mask(16, (16, 11), "bool"),
            num_frames=4, height=8, width=8, rope_interpolation_scale=(8 / 25, 32, 32), return_dict=False),
    ),
    "ltx-2": Entry(
        cls="LTX2VideoTransformer3DModel",
        full=dict(rope_type="split"),
        full_inputs=dict(  # 768 x 512, 121 frames
            hidden_states=Normal((1, 6144, 128)), audio_hidden_states=Normal((1, 126, 128)),
            encoder_hidden_states=Normal((1, 1024, 3840)),
            audio_encoder_hidden_states=Normal((1, 1024, 3840)),
            timestep=Values([750.0], "float32"), sigma=Values([750.0], "float32"),
            encoder_attention_mask=Mask(1024, (1024,)), audio_encoder_attention_mask=Mask(1024, (1024,)),
            num_frames=16, height=16, width=24, fps=24.0, audio_num_frames=126, return_dict=False),
        tiny=dict(in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=16,
                  cross_attention_dim=64, audio_in_channels=6, audio_out_channels=6,
                  audio_num_attention_heads=4, audio_attention_head_dim=8, audio_cross_attention_dim=32,
                  num_layers=3, caption_channels=24, rope_type="split"),
        tiny_inputs=dict(
            hidden_states=Normal((2, 256, 8)), audio_hidden_states=Normal((2, 24, 6)),
            encoder_hidden_states=Normal((2, 16, 24)), audio_encoder_hidden_states=Normal((2, 16, 24)),
            timestep=Values([750.0, 250.0], "float32"), sigma=Values([750.0, 250.0], "float32"),
            encoder_attention_mask=Mask(16, (16, 11)), audio_encoder_attention_mask=Mask(16, (16, 11)),
            num_frames=4, height=8, width=8, fps=24.0, audio_num_frames=24, return_dict=False),
    ),
    "ltx-2.3": Entry(
        cls="LTX2VideoTransformer3DModel",
        tiny=dict(in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=16,
                  cross_attention_dim=64, audio_in_channels=6, audio_out_channels=6,
                  audio_num_attention_heads=4, audio_attention_head_dim=8, audio_cross_attention_dim=32,
                  num_layers=3, rope_type="split", use_prompt_embeddings=False, gated_attn=True,
                  cross_attn_mod=True, audio_gated_attn=True, audio_cross_attn_mod=True, perturbed_attn=True),
        tiny_inputs=dict(  # the pass with perturbed guidance in the last layer
            hidden_states=Normal((2, 256, 8)), audio_hidden_states=Normal((2, 24, 6)),
            encoder_hidden_states=Normal((2, 16, 64)), audio_encoder_hidden_states=Normal((2, 16, 32)),
            timestep=Values([750.0, 250.0], "float32"), sigma=Values([750.0, 250.0], "float32"),
            encoder_attention_mask=Mask(16, (16, 11)), audio_encoder_attention_mask=Mask(16, (16, 11)),
            num_frames=4, height=8, width=8, fps=24.0, audio_num_frames=24,
            video_coords=Values([VIDEO_COORDS] * 2, "float32"),
            audio_coords=Values([AUDIO_COORDS] * 2, "float32"), spatio_temporal_guidance_blocks=[2],
            use_cross_timestep=True, return_dict=False),
    ),
}
