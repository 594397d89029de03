"""The prior of unCLIP and Kandinsky 2: denoises one image embedding behind a causal text sequence (no images)."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Mask, Normal, Values

ENTRIES = {
    "kandinsky-2.2-prior": Entry(
        cls="PriorTransformer",
        full=dict(num_attention_heads=32, attention_head_dim=64, num_layers=20, embedding_dim=1280,
                  num_embeddings=77, additional_embeddings=4),
        full_inputs=dict(  # a guidance pair
            hidden_states=Normal((2, 1280)), timestep=Values([750, 750], "int64"),
            proj_embedding=Normal((2, 1280)), encoder_hidden_states=Normal((2, 77, 1280)),
            attention_mask=Mask(77, (2, 20), "bool"), return_dict=False),
        tiny=dict(num_attention_heads=4, attention_head_dim=16, num_layers=3, embedding_dim=32,
                  num_embeddings=16, additional_embeddings=4, embedding_proj_norm_type="layer",
                  norm_in_type="layer"),
        tiny_inputs=dict(
            hidden_states=Normal((2, 32)), timestep=Values([750, 250], "int64"),
            proj_embedding=Normal((2, 32)), encoder_hidden_states=Normal((2, 16, 32)),
            attention_mask=Mask(16, (16, 11), "bool"), return_dict=False),
    ),
}
