"""EasyAnimate: two streams, rotary positions of the video only; late blocks may share the text's weights."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Normal, Values

ENTRIES = {
    "easyanimate-5.1": Entry(
        cls="EasyAnimateTransformer3DModel",
        full=dict(num_attention_heads=48, attention_head_dim=64, in_channels=16, out_channels=16,
                  patch_size=2, num_layers=48, mmdit_layers=48, time_embed_dim=512,
                  add_norm_text_encoder=True, text_embed_dim=3584, after_norm=False),
        full_inputs=dict(  # 512 x 512, 49 frames; a guidance pair
            hidden_states=Normal((2, 16, 13, 64, 64)), timestep=Values([750.0, 750.0]),
            encoder_hidden_states=Normal((2, 256, 3584)), return_dict=False),
        tiny=dict(num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=4, patch_size=2,
                  num_layers=4, mmdit_layers=2, time_embed_dim=32, add_norm_text_encoder=True,
                  text_embed_dim=32, after_norm=False),
        tiny_inputs=dict(
            hidden_states=Normal((2, 4, 4, 16, 16)), timestep=Values([750.0, 250.0]),
            encoder_hidden_states=Normal((2, 16, 32)), return_dict=False),
    ),
}
