"""The generic transformers of older pipelines: over feature maps, discrete codes, patches and along frames."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Integers, Mask, Normal, Values

HEADS = dict(num_attention_heads=4, attention_head_dim=16, num_layers=3)

ENTRIES = {
    "transformer-2d-continuous": Entry(
        cls="Transformer2DModel", no_denoiser="a part of a U-Net: features in and out, no timestep",
        tiny=dict(**HEADS, in_channels=32, norm_num_groups=8, cross_attention_dim=32),
        tiny_inputs=dict(
            hidden_states=Normal((2, 32, 16, 16)), encoder_hidden_states=Normal((2, 16, 32)), timestep=None,
            encoder_attention_mask=Mask(16, (16, 11)), return_dict=False),
    ),
    "transformer-2d-linear": Entry(  # the same with linear projections and doubled self-attention
        cls="Transformer2DModel", no_denoiser="a part of a U-Net: features in and out, no timestep",
        tiny=dict(**HEADS, in_channels=32, norm_num_groups=8, use_linear_projection=True,
                  double_self_attention=True),
        tiny_inputs=dict(hidden_states=Normal((2, 32, 16, 16)), attention_mask=Mask(256, (256, 200)),
                         return_dict=False),
    ),
    "transformer-2d-vectorized": Entry(  # VQ-Diffusion: codes in, log-probabilities out, one timestep for all
        cls="Transformer2DModel",
        tiny=dict(**HEADS, num_vector_embeds=17, sample_size=16, cross_attention_dim=32, attention_bias=True,
                  norm_type="ada_norm", num_embeds_ada_norm=1000, activation_fn="geglu-approximate"),
        tiny_inputs=dict(hidden_states=Integers((2, 256), 17), encoder_hidden_states=Normal((2, 16, 32)),
                         timestep=Values(750, "int64"), return_dict=False),
    ),
    "transformer-2d-patched": Entry(  # DiT as of old: class labels
        cls="Transformer2DModel",
        tiny=dict(**HEADS, in_channels=4, out_channels=8, sample_size=32, patch_size=2, attention_bias=True,
                  norm_type="ada_norm_zero", num_embeds_ada_norm=10, activation_fn="gelu-approximate",
                  norm_elementwise_affine=False),
        tiny_inputs=dict(hidden_states=Normal((2, 4, 32, 32)), timestep=Values([750, 250], "int64"),
                         class_labels=Values([3, 7], "int64"), return_dict=False),
    ),
    "transformer-temporal": Entry(  # a block of a video U-Net: frames in the batch, attention along them only
        cls="TransformerTemporalModel", no_denoiser="a part of a video U-Net: features in and out, no timestep",
        tiny=dict(**HEADS, in_channels=32, norm_num_groups=8, positional_embeddings="sinusoidal",
                  num_positional_embeddings=4),
        tiny_inputs=dict(hidden_states=Normal((2 * 4, 32, 8, 8)), num_frames=4, return_dict=False),
    ),
}
