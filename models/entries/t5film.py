"""The denoiser of spectrogram diffusion: T5 decoder layers with FiLM, over two masked encodings."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Mask, Normal, Values

ENTRIES = {
    "t5-film-decoder": Entry(
        cls="T5FilmDecoder",
        tiny=dict(input_dims=16, targets_length=256, max_decoder_noise_time=2000.0, d_model=64, num_layers=3,
                  num_heads=4, d_kv=16, d_ff=96),
        tiny_inputs=dict(  # notes, then the spectrogram before
            encodings_and_masks=[(Normal((2, 16, 64)), Mask(16, (16, 11), "bool")),
                                 (Normal((2, 16, 64)), Mask(16, (16, 9), "bool"))],
            decoder_input_tokens=Normal((2, 256, 16)), decoder_noise_time=Values([0.75, 0.25], "float32")),
    ),
}
