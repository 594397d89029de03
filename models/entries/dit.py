"""DiT: class labels, a modulation per block, no text."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Normal, Values

ENTRIES = {
    "dit-xl-2-256": Entry(
        cls="DiTTransformer2DModel",
        full=dict(num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28,
                  sample_size=32, patch_size=2, num_embeds_ada_norm=1000),
        full_inputs=dict(  # 256 x 256; a guidance pair
            hidden_states=Normal((2, 4, 32, 32)), timestep=Values([750, 750], "int64"),
            class_labels=Values([207, 1000], "int64"), return_dict=False),
        tiny=dict(num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=3,
                  sample_size=32, patch_size=2, num_embeds_ada_norm=10),
        tiny_inputs=dict(
            hidden_states=Normal((2, 4, 32, 32)), timestep=Values([750, 250], "int64"),
            class_labels=Values([3, 10], "int64"), return_dict=False),
    ),
}
