"""Wan with more: VACE's control branch, Animate's face and pose, Animate 2's reference keys and values."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Made, Normal, Values

WAN = dict(patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=16, out_channels=4, text_dim=32,
           freq_dim=32, ffn_dim=128, num_layers=4, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
           rope_max_seq_len=32)
WAN_14B = dict(patch_size=(1, 2, 2), num_attention_heads=40, attention_head_dim=128, out_channels=16,
               text_dim=4096, freq_dim=256, ffn_dim=13824, num_layers=40, cross_attn_norm=True,
               qk_norm="rms_norm_across_heads")
ANIMATE_2 = dict(text_len=16, in_dim=12, dim=64, ffn_dim=128, freq_dim=32, text_dim=32, out_dim=4, num_heads=4,
                 num_layers=3)
CACHE = "diffusers.models.transformers.transformer_wan_animate_2:WanAnimate2KVCache"
TEXTS = [Normal((16, 32)), Normal((11, 32))]
KEPT = {f"layer_caches.{i}.{k}": Normal((2, 192, 4, 16)) for i in range(3) for k in ("key", "value")}

ENTRIES = {
    "wan2.1-vace-14b": Entry(
        cls="WanVACETransformer3DModel",
        full=dict(**WAN_14B, in_channels=16, vace_layers=[0, 5, 10, 15, 20, 25, 30, 35], vace_in_channels=96),
        full_inputs=dict(  # 832 x 480, 81 frames
            hidden_states=Normal((1, 16, 21, 60, 104)), timestep=Values([750], "int64"),
            encoder_hidden_states=Normal((1, 512, 4096)), control_hidden_states=Normal((1, 96, 21, 60, 104)),
            control_hidden_states_scale=Values([1.0] * 8), return_dict=False),
        tiny=dict(**WAN, in_channels=4, vace_layers=[0, 2], vace_in_channels=12),
        tiny_inputs=dict(
            hidden_states=Normal((2, 4, 4, 16, 16)), timestep=Values([750, 250], "int64"),
            encoder_hidden_states=Normal((2, 16, 32)), control_hidden_states=Normal((2, 12, 4, 16, 16)),
            control_hidden_states_scale=Values([1.0, 0.5]), return_dict=False),
    ),
    "wan2.2-animate-14b": Entry(
        cls="WanAnimateTransformer3DModel",
        full=dict(**WAN_14B, in_channels=36, latent_channels=16, image_dim=1280, added_kv_proj_dim=5120),
        full_inputs=dict(  # 1280 x 720, 77 frames and the reference
            hidden_states=Normal((1, 36, 21, 90, 160)), timestep=Values([750], "int64"),
            encoder_hidden_states=Normal((1, 512, 4096)), encoder_hidden_states_image=Normal((1, 257, 1280)),
            pose_hidden_states=Normal((1, 16, 20, 90, 160)), face_pixel_values=Normal((1, 3, 77, 512, 512)),
            return_dict=False),
        tiny=dict(**WAN, in_channels=12, latent_channels=4, image_dim=24, added_kv_proj_dim=64,
                  motion_encoder_channel_sizes={"4": 16, "8": 12, "16": 8}, motion_encoder_size=16,
                  motion_style_dim=16, motion_dim=6, motion_encoder_dim=24, face_encoder_hidden_dim=16,
                  face_encoder_num_heads=2, inject_face_latents_blocks=2),
        tiny_inputs=dict(  # the class takes the last 512 tokens for text, whatever their number
            hidden_states=Normal((2, 12, 4, 16, 16)), timestep=Values([750, 250], "int64"),
            encoder_hidden_states=Normal((2, 512, 32)), encoder_hidden_states_image=Normal((2, 8, 24)),
            pose_hidden_states=Normal((2, 4, 3, 16, 16)), face_pixel_values=Normal((2, 3, 9, 16, 16)),
            return_dict=False),
    ),
    "wan-animate-2": Entry(  # a denoising step: block-masked attention to cached keys of the reference
        cls="WanAnimate2Transformer3DModel",
        tiny=ANIMATE_2,
        tiny_inputs=dict(
            hidden_states=[Normal((4, 4, 16, 16))] * 2, condition_latents=[Normal((8, 4, 16, 16))] * 2,
            timestep=Values([750, 250], "int64"), encoder_hidden_states=TEXTS,
            encoder_hidden_states_image=Normal((2, 5, 1280)), kv_cache=Made(CACHE, (3,), KEPT),
            kv_cache_mode="cached", seq_len=256, reference_grid_sizes=Values([[3, 8, 8]] * 2, "int64"),
            origin_len=9, origin_area=[128, 128], return_dict=False),
    ),
    "wan-animate-2-reference": Entry(  # the pass that fills the cache
        cls="WanAnimate2Transformer3DModel",
        tiny=ANIMATE_2,
        tiny_inputs=dict(
            hidden_states=[Normal((4, 4, 16, 16))] * 2, condition_latents=[Normal((8, 4, 16, 16))] * 2,
            timestep=Values([750, 250], "int64"), encoder_hidden_states=TEXTS,
            encoder_hidden_states_image=Normal((2, 5, 1280)), kv_cache=Made(CACHE, (3,)),
            kv_cache_mode="extract", seq_len=256, offset_grid_sizes=Values([[4, 8, 8]] * 2, "int64"),
            return_dict=False),
    ),
}
