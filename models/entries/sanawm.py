"""Sana-WM: gated delta rule along frames, softmax every second block, camera rays; and its LTX-2 refiner."""
# fmt: off

from __future__ import annotations

import math

from ..specs import Entry, Made, Mask, Normal, Rope, Values


def _camera(frame: int, speed: float) -> list[float]:
    """A camera to world matrix turning about y while it moves, then fx, fy, cx, cy in latent pixels."""
    c, s = math.cos(frame * speed), math.sin(frame * speed)
    return [c, 0, s, 0.1 * frame, 0, 1, 0, 0.2 * frame, -s, 0, c, 0.3 * frame, 0, 0, 0, 1, 8.0, 7.0, 4.0, 4.0]


REFINER = dict(in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=16, cross_attention_dim=64,
               gated_attn=True, audio_in_channels=8, audio_out_channels=8, audio_num_attention_heads=4,
               audio_attention_head_dim=8, audio_cross_attention_dim=32, num_layers=3, caption_channels=32)
CACHE = "diffusers.models.transformers.transformer_sana_wm_refiner:SanaWMRefinerKVCache"
KEPT = dict(sink_k_pre=64, sink_v=64, history_k=128, history_v=128)  # keys and values of earlier frames, tokens

ENTRIES = {
    "sana-wm": Entry(
        cls="SanaWMTransformer3DModel",
        tiny=dict(in_channels=8, num_layers=4, hidden_size=64, num_attention_heads=4, softmax_every_n=2,
                  linear_head_dim=16, chunk_plucker_channels=6, chunk_plucker_post_attn_blocks=3,
                  caption_channels=32, mlp_ratio=2.0),
        tiny_inputs=dict(
            hidden_states=Normal((2, 8, 4, 8, 8)), encoder_hidden_states=Normal((2, 16, 32)),
            timestep=Values([[[0.0, 750.0, 750.0, 750.0]], [[0.0, 250.0, 250.0, 250.0]]], "float32"),
            mask=Mask(16, (16, 11)), data_info=dict(img_hw=Values([[256.0, 256.0]], "float32")),
            camera_conditions=Values([[_camera(i, v) for i in range(4)] for v in (0.1, 0.2)]),
            chunk_plucker=Normal((2, 6, 4, 8, 8)), return_dict=False),
    ),
    "sana-wm-refiner": Entry(  # the audio half of LTX-2 has weights but no part in the forward
        cls="SanaWMLTX2RefinerTransformer3DModel",
        tiny=dict(**REFINER, rope_type="split"),
        tiny_inputs=dict(  # one time per token; earlier frames are keys and values in the cache
            hidden_states=Normal((2, 256, 8)), encoder_hidden_states=Normal((2, 16, 32)),
            timestep=Values([[750.0] * 256, [250.0] * 256], "float32"),
            video_rotary_emb=Rope((4, 8, 8), (20, 22, 22), layout="once", heads=4, batch=2),
            encoder_attention_mask=Mask(16, (16, 11)), kv_cache_mode="inject", return_dict=False,
            kv_cache=Made(CACHE, (3,), {
                "sink_pe": Rope((1, 8, 8), (20, 22, 22), layout="once", heads=4, batch=2),
                **{f"layer_caches.{i}.{k}": Normal((2, n, 64)) for i in range(3) for k, n in KEPT.items()}})),
    ),
    "sana-wm-refiner-plain": Entry(  # as the first block of frames: no cache
        cls="SanaWMLTX2RefinerTransformer3DModel",
        tiny=dict(**REFINER, rope_type="interleaved"),
        tiny_inputs=dict(
            hidden_states=Normal((2, 256, 8)), encoder_hidden_states=Normal((2, 16, 32)),
            timestep=Values([[750.0] * 256, [250.0] * 256], "float32"),
            video_rotary_emb=Rope((4, 8, 8), (20, 22, 22), batch=2),
            encoder_attention_mask=Mask(16, (16, 11)), return_dict=False),
    ),
}
