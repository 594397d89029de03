"""Bria 3.2 and FIBO: two streams, then one; FIBO renews half of the text's features before every block."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Ids, Mask, Normal, Values

ENTRIES = {
    "bria-3.2": Entry(
        cls="BriaTransformer2DModel",
        tiny=dict(in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
                  num_attention_heads=4, joint_attention_dim=32, axes_dims_rope=[4, 6, 6]),
        tiny_inputs=dict(
            hidden_states=Normal((2, 256, 16)), encoder_hidden_states=Normal((2, 16, 32)),
            timestep=Values([750.0, 250.0], "float32"), img_ids=Ids((16, 16)),
            txt_ids=Ids((16,), origin=True), return_dict=False),
    ),
    "fibo": Entry(
        cls="BriaFiboTransformer2DModel",
        tiny=dict(in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
                  num_attention_heads=4, joint_attention_dim=32, text_encoder_dim=24,
                  axes_dims_rope=[4, 6, 6]),
        tiny_inputs=dict(
            hidden_states=Normal((2, 256, 16)), encoder_hidden_states=Normal((2, 16, 32)),
            text_encoder_layers=[Normal((2, 16, 24))] * 4, timestep=Values([750.0, 250.0]),
            img_ids=Ids((16, 16)), txt_ids=Ids((16,), origin=True), joint_attention_kwargs=dict(
                attention_mask=Values([[[[i < n or i > 15 for i in range(272)]]] for n in (16, 11)], "bool")),
            return_dict=False),
    ),
    "fibo-2": Entry(  # the number of gist tokens is read from the mask; the first refiner has no text
        cls="BriaFibo2Transformer2DModel",
        tiny=dict(in_channels=4, patch_size=2, dim=64, n_layers=3, n_refiner_layers=1, n_heads=4,
                  cap_feat_dim=32, injection_layer_ids=(1,), perceiver_num_layers=1, min_num_gist_tokens=8,
                  max_num_gist_tokens=16, gist_step=4, gist_min_text_len=4, gist_max_text_len=16,
                  axes_dims=(4, 6, 6), axes_lens=(64, 32, 32)),
        tiny_inputs=dict(
            hidden_states=Normal((2, 4, 32, 32)), timestep=Values([0.75, 0.25], "float32"),
            encoder_hidden_states=Normal((2, 2, 16, 32)), encoder_attention_mask=Mask(16, (16, 9), "bool"),
            context_latents=None, return_dict=False),
    ),
}
