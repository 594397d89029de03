"""Encoders of prompts and images, of transformers: 128 tokens of a padded prompt, or an image of 64 patches."""
# fmt: off

from __future__ import annotations

from typing import Any

from ..specs import Integers, Mask, Normal, Part

PROMPT = dict(input_ids=Integers((1, 128), 100), attention_mask=Mask(128, (100,)), return_dict=False)
HIDDEN = PROMPT | dict(output_hidden_states=True, use_cache=False)
PIXELS = dict(pixel_values=Normal((1, 3, 32, 32)), return_dict=False)
DECODER: dict[str, Any] = dict(
    vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2)
TOWER: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=4)

ENTRIES = {
    "clip-text": Part(
        cls="transformers:CLIPTextModelWithProjection", made_from="transformers:CLIPTextConfig",
        config=dict(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
                    max_position_embeddings=128, projection_dim=32, bos_token_id=1, eos_token_id=2),
        calls=dict(forward=PROMPT | dict(output_hidden_states=True))),
    "clip-vision": Part(
        cls="transformers:CLIPVisionModelWithProjection", made_from="transformers:CLIPVisionConfig",
        config=TOWER | dict(projection_dim=32), calls=dict(forward=PIXELS)),
    "gemma2": Part(
        cls="transformers:Gemma2Model", made_from="transformers:Gemma2Config",
        config=DECODER | dict(sliding_window=64), calls=dict(forward=HIDDEN)),
    "llama": Part(
        cls="transformers:LlamaModel", made_from="transformers:LlamaConfig", config=DECODER,
        calls=dict(forward=HIDDEN)),
    "qwen2.5-vl": Part(
        cls="transformers:Qwen2_5_VLTextModel", made_from="transformers:Qwen2_5_VLTextConfig",
        config=DECODER | dict(rope_parameters=dict(rope_type="default", mrope_section=[2, 1, 1], rope_theta=1e6)),
        calls=dict(forward=HIDDEN)),
    "qwen3": Part(
        cls="transformers:Qwen3Model", made_from="transformers:Qwen3Config", config=DECODER,
        calls=dict(forward=HIDDEN)),
    "siglip-vision": Part(
        cls="transformers:SiglipVisionModel", made_from="transformers:SiglipVisionConfig", config=TOWER,
        calls=dict(forward=PIXELS)),
    "t5": Part(
        cls="transformers:T5EncoderModel", made_from="transformers:T5Config",
        config=dict(vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4,
                    feed_forward_proj="gated-gelu"),
        calls=dict(forward=PROMPT)),
    "umt5": Part(
        cls="transformers:UMT5EncoderModel", made_from="transformers:UMT5Config",
        config=dict(vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4,
                    feed_forward_proj="gated-gelu"),
        calls=dict(forward=PROMPT)),
}
