"""HiDream-I1: two streams, then one, another Llama layer appended to every block, a mixture of experts.

The dense one has no experts, and a latent that is not square: padded to a fixed length, with a mask.
"""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Normal, Values

ENTRIES = {
    "hidream-i1": Entry(
        cls="HiDreamImageTransformer2DModel",
        full=dict(patch_size=2, in_channels=16, out_channels=16, num_layers=16, num_single_layers=32,
                  attention_head_dim=128, num_attention_heads=20, caption_channels=[4096, 4096],
                  text_emb_dim=2048, num_routed_experts=4, num_activated_experts=2,
                  axes_dims_rope=(64, 32, 32), max_resolution=(128, 128),
                  llama_layers=[*range(32), *[31] * 16]),
        full_inputs=dict(  # 1024 x 1024; a guidance pair
            hidden_states=Normal((2, 16, 128, 128)), timesteps=Values([750.0, 750.0], "float32"),
            encoder_hidden_states_t5=Normal((2, 128, 4096)),
            encoder_hidden_states_llama3=Normal((32, 2, 128, 4096)), pooled_embeds=Normal((2, 2048)),
            return_dict=False),
        tiny=dict(patch_size=2, in_channels=4, out_channels=4, num_layers=2, num_single_layers=2,
                  attention_head_dim=16, num_attention_heads=4, caption_channels=[32, 24], text_emb_dim=24,
                  num_routed_experts=4, num_activated_experts=2, axes_dims_rope=(8, 4, 4),
                  max_resolution=(32, 32), llama_layers=[0, 1, 2, 2]),
        tiny_inputs=dict(
            hidden_states=Normal((2, 4, 32, 32)), timesteps=Values([750.0, 250.0], "float32"),
            encoder_hidden_states_t5=Normal((2, 8, 32)), encoder_hidden_states_llama3=Normal((3, 2, 8, 24)),
            pooled_embeds=Normal((2, 24)), return_dict=False),
    ),
    "hidream-dense": Entry(
        cls="HiDreamImageTransformer2DModel",
        tiny=dict(patch_size=2, in_channels=4, out_channels=4, num_layers=2, num_single_layers=2,
                  attention_head_dim=16, num_attention_heads=4, caption_channels=[32, 24], text_emb_dim=24,
                  num_routed_experts=0, axes_dims_rope=(8, 4, 4), max_resolution=(32, 32),
                  llama_layers=[0, 1, 2, 2]),
        tiny_inputs=dict(
            hidden_states=Normal((2, 4, 24, 32)), timesteps=Values([750.0, 250.0], "float32"),
            encoder_hidden_states_t5=Normal((2, 8, 32)), encoder_hidden_states_llama3=Normal((3, 2, 8, 24)),
            pooled_embeds=Normal((2, 24)), return_dict=False),
    ),
}
