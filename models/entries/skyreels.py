"""SkyReels-V2: Wan with a time per frame (diffusion forcing), block-causal frames and the frame rate."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Normal, Values

ENTRIES = {
    "skyreels-v2-df-1.3b": Entry(
        cls="SkyReelsV2Transformer3DModel",
        full=dict(patch_size=(1, 2, 2), num_attention_heads=12, attention_head_dim=128, in_channels=16,
                  out_channels=16, text_dim=4096, freq_dim=256, ffn_dim=8960, num_layers=30,
                  cross_attn_norm=True, qk_norm="rms_norm_across_heads", inject_sample_info=True),
        full_inputs=dict(  # 960 x 544, 97 frames
            hidden_states=Normal((1, 16, 25, 68, 120)), timestep=Values([[750] * 25], "int64"),
            encoder_hidden_states=Normal((1, 512, 4096)), enable_diffusion_forcing=True, fps=[1],
            return_dict=False),
        tiny=dict(patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=16, in_channels=4,
                  out_channels=4, text_dim=32, freq_dim=32, ffn_dim=128, num_layers=3, cross_attn_norm=True,
                  qk_norm="rms_norm_across_heads", rope_max_seq_len=32, inject_sample_info=True,
                  num_frame_per_block=2),
        tiny_inputs=dict(
            hidden_states=Normal((2, 4, 4, 16, 16)),
            timestep=Values([[250, 250, 750, 750], [125, 125, 500, 500]], "int64"),
            encoder_hidden_states=Normal((2, 16, 32)), enable_diffusion_forcing=True, fps=[1],
            return_dict=False),
    ),
}
