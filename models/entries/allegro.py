"""Allegro: video; rotary tables looked up by positions, masked cross-attention, one modulation table."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Mask, Normal, Rope, Values


def _positions(frames: int, height: int, width: int) -> list[Values]:
    size = range(frames * height * width)
    return [Values([[i // (height * width) for i in size]], "int64"),
            Values([[i // width % height for i in size]], "int64"),
            Values([[i % width for i in size]], "int64")]


ENTRIES = {
    "allegro": Entry(
        cls="AllegroTransformer3DModel",
        full=dict(patch_size=2, patch_size_t=1, num_attention_heads=24, attention_head_dim=96, in_channels=4,
                  out_channels=4, num_layers=32, cross_attention_dim=2304, sample_height=90, sample_width=160,
                  sample_frames=22, caption_channels=4096),
        full_inputs=dict(  # 1280 x 720, 5 of its 22 latent frames; a guidance pair
            hidden_states=Normal((2, 4, 5, 90, 160)), encoder_hidden_states=Normal((2, 512, 4096)),
            encoder_attention_mask=Mask(512, (20, 120)), timestep=Values([750.0, 750.0], "float32"),
            image_rotary_emb=(tuple(Rope((n,), (32,), step=1 / scale, layout="halves")
                                    for n, scale in ((5, 2.2), (45, 2.0), (80, 2.0))), _positions(5, 45, 80)),
            return_dict=False),
        tiny=dict(patch_size=2, patch_size_t=1, num_attention_heads=4, attention_head_dim=12, in_channels=4,
                  out_channels=4, num_layers=3, cross_attention_dim=48, sample_height=16, sample_width=16,
                  sample_frames=4, caption_channels=32),
        tiny_inputs=dict(
            hidden_states=Normal((2, 4, 4, 16, 16)), encoder_hidden_states=Normal((2, 16, 32)),
            encoder_attention_mask=Mask(16, (16, 11)), timestep=Values([750.0, 250.0], "float32"),
            image_rotary_emb=(tuple(Rope((n,), (4,), step=1 / scale, layout="halves")
                                    for n, scale in ((4, 2.2), (8, 2.0), (8, 2.0))), _positions(4, 8, 8)),
            return_dict=False),
    ),
}
