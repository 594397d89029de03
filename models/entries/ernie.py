"""ERNIE-Image: image, then text, in one stream [tokens, batch, features]; text lengths make the mask."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Normal, Values

ENTRIES = {
    "ernie-image": Entry(
        cls="ErnieImageTransformer2DModel",
        tiny=dict(hidden_size=64, num_attention_heads=4, num_layers=3, ffn_hidden_size=128, in_channels=16,
                  out_channels=16, patch_size=1, text_in_dim=32, rope_axes_dim=(4, 6, 6)),
        tiny_inputs=dict(
            hidden_states=Normal((2, 16, 16, 16)), timestep=Values([750.0, 250.0]),
            text_bth=Normal((2, 16, 32)), text_lens=Values([16, 11], "int64"), return_dict=False),
    ),
}
