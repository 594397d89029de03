"""AnyFlow: Wan with a second timestep and a timestep per frame; FAR generates chunks with flex attention."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Normal, Values

ENTRIES = {
    "anyflow-14b": Entry(
        cls="AnyFlowTransformer3DModel",
        full=dict(patch_size=(1, 2, 2), num_attention_heads=40, attention_head_dim=128, in_channels=16,
                  out_channels=16, text_dim=4096, freq_dim=256, ffn_dim=13824, num_layers=40,
                  rope_max_seq_len=1024),
        full_inputs=dict(  # 832 x 480, 33 frames
            hidden_states=Normal((1, 9, 16, 60, 104)), timestep=Values([[750.0] * 9], "float32"),
            r_timestep=Values([[500.0] * 9], "float32"), encoder_hidden_states=Normal((1, 512, 4096)),
            return_dict=False),
        tiny=dict(patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=12, in_channels=4,
                  out_channels=4, text_dim=32, freq_dim=32, ffn_dim=128, num_layers=3, rope_max_seq_len=32),
        tiny_inputs=dict(
            hidden_states=Normal((2, 4, 4, 16, 16)), timestep=Values([[750.0] * 4, [250.0] * 4], "float32"),
            r_timestep=Values([[500.0] * 4, [125.0] * 4], "float32"),
            encoder_hidden_states=Normal((2, 16, 32)), return_dict=False),
    ),
    "anyflow-far": Entry(  # the fifth chunk, of 4 frames, after two compressed and two full ones in the cache
        cls="AnyFlowFARTransformer3DModel",
        tiny=dict(patch_size=(1, 2, 2), compressed_patch_size=(1, 4, 4), full_chunk_limit=3,
                  num_attention_heads=4, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=32,
                  freq_dim=32, ffn_dim=128, num_layers=3, rope_max_seq_len=32,
                  chunk_partition=(1, 1, 1, 1, 4)),
        tiny_inputs=dict(
            hidden_states=Normal((2, 4, 4, 16, 16)), timestep=Values([[750.0] * 4, [250.0] * 4], "float32"),
            r_timestep=Values([[500.0] * 4, [125.0] * 4], "float32"),
            encoder_hidden_states=Normal((2, 16, 32)), chunk_partition=[1, 1, 1, 1, 4],
            kv_cache_flag=dict(num_cached_chunks=4, is_cache_step=False),
            kv_cache={layer: dict(full_cache=Normal((2, 2, 4, 768, 12)),
                                  compressed_cache=Normal((2, 2, 4, 192, 12))) for layer in range(3)},
            return_dict=False),
    ),
    "anyflow-far-joint": Entry(  # all chunks at once: compressed and full patches under a causal block mask
        cls="AnyFlowFARTransformer3DModel",
        tiny=dict(patch_size=(1, 2, 2), compressed_patch_size=(1, 4, 4), full_chunk_limit=2,
                  num_attention_heads=4, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=32,
                  freq_dim=32, ffn_dim=128, num_layers=3, rope_max_seq_len=32, chunk_partition=(1, 1, 2)),
        tiny_inputs=dict(
            hidden_states=Normal((2, 4, 4, 20, 20)), timestep=Values([[750.0] * 4, [250.0] * 4], "float32"),
            r_timestep=Values([[500.0] * 4, [125.0] * 4], "float32"),
            encoder_hidden_states=Normal((2, 16, 32)), chunk_partition=[1, 1, 2], return_dict=False),
    ),
}
