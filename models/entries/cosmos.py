"""Cosmos 1.0; 2.5 with control residuals and an image to attend to; 3, one packed sequence of modalities."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Integers, Mask, Normal, Values

ENTRIES = {
    "cosmos-1.0": Entry(  # published with concat_padding_mask=True, whose forward needs torchvision
        cls="CosmosTransformer3DModel",
        tiny=dict(in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=16, num_layers=3,
                  mlp_ratio=2.0, text_embed_dim=32, adaln_lora_dim=16, max_size=(16, 32, 32),
                  concat_padding_mask=False, extra_pos_embed_type="learnable"),
        tiny_inputs=dict(
            hidden_states=Normal((2, 4, 4, 16, 16)), timestep=Values([0.5, -0.25]), fps=30,
            encoder_hidden_states=Normal((2, 16, 32)), attention_mask=Mask(16, (16, 11), "bool"),
            return_dict=False),
    ),
    "cosmos-2.5": Entry(  # a timestep per frame; sample i is conditioned on its first i + 1 frames
        cls="CosmosTransformer3DModel",
        tiny=dict(in_channels=5, out_channels=4, num_attention_heads=4, attention_head_dim=16, num_layers=4,
                  mlp_ratio=2.0, text_embed_dim=32, adaln_lora_dim=16, max_size=(16, 32, 32),
                  rope_scale=(1.0, 3.0, 3.0), concat_padding_mask=False, extra_pos_embed_type=None,
                  use_crossattn_projection=True, crossattn_proj_in_channels=48,
                  encoder_hidden_states_channels=32, controlnet_block_every_n=2, img_context_dim_in=24,
                  img_context_num_tokens=8, img_context_dim_out=64),
        tiny_inputs=dict(
            hidden_states=Normal((2, 4, 4, 16, 16)),
            encoder_hidden_states=(Normal((2, 16, 48)), Normal((2, 8, 24))),
            timestep=Values([[[[[t]] for t in ts]] for ts in ([0.1, 0.7, 0.7, 0.7], [0.1, 0.1, 0.3, 0.3])]),
            condition_mask=Values([[[[[float(f < n)] * 16] * 16 for f in range(4)]] for n in (1, 2)]),
            block_controlnet_hidden_states=[Normal((2, 256, 64)), Normal((2, 256, 64))], return_dict=False),
    ),
    "cosmos3-omni": Entry(  # no batch: 16 text tokens, 4 frames of 64 (one given), 24 of sound, 8 actions
        cls="Cosmos3OmniTransformer",
        tiny=dict(head_dim=16, hidden_size=64, intermediate_size=128, latent_channel=4, num_attention_heads=4,
                  num_hidden_layers=3, num_key_value_heads=2, patch_latent_dim=16, rope_axes_dim=[4, 2, 2],
                  action_dim=6, action_gen=True, num_embodiment_domains=4, sound_dim=8, sound_gen=True,
                  vocab_size=64),
        tiny_inputs=dict(
            input_ids=Integers((16,), 64), text_indexes=Values(range(16), "int64"),
            und_len=16, sequence_length=304,
            position_ids=Values([[*range(16), *(15016 + i // 64 for i in range(256)), *range(15016, 15048)],
                                 [*range(16), *(i // 8 % 8 for i in range(256)), *[0] * 32],
                                 [*range(16), *(i % 8 for i in range(256)), *[0] * 32]], "float32"),
            vision_tokens=[Normal((1, 4, 4, 16, 16))], vision_token_shapes=[(4, 8, 8)],
            vision_sequence_indexes=Values(range(16, 272), "int64"),
            vision_timesteps=Values([750.0] * 192, "float32"),
            vision_mse_loss_indexes=Values(range(80, 272), "int64"),
            vision_noisy_frame_indexes=[Values([1, 2, 3], "int64")],
            sound_tokens=[Normal((8, 24))], sound_token_shapes=[(24, 1, 1)],
            sound_sequence_indexes=Values(range(272, 296), "int64"),
            sound_timesteps=Values([750.0] * 24, "float32"),
            sound_mse_loss_indexes=Values(range(272, 296), "int64"),
            sound_noisy_frame_indexes=[Values(range(24), "int64")],
            action_tokens=[Normal((8, 6))], action_token_shapes=[(8, 1, 1)],
            action_domain_ids=[Values([2], "int64")],
            action_sequence_indexes=Values(range(296, 304), "int64"),
            action_timesteps=Values([750.0] * 7, "float32"),
            action_mse_loss_indexes=Values(range(297, 304), "int64"),
            action_noisy_frame_indexes=[Values(range(1, 8), "int64")], return_dict=False),
    ),
}
