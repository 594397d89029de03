"""PRX: image queries over text and image keys, rotation matrices as positions, resolution as a condition."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Mask, Normal, Values

ENTRIES = {
    "prx-512": Entry(
        cls="PRXTransformer2DModel",
        full=dict(in_channels=16, patch_size=2, context_in_dim=2304, hidden_size=1792, mlp_ratio=3.5,
                  num_heads=28, depth=16, axes_dim=[32, 32]),
        full_inputs=dict(  # 512 x 512; a guidance pair, one timestep for both
            hidden_states=Normal((2, 16, 64, 64)), encoder_hidden_states=Normal((2, 256, 2304)),
            timestep=Values([0.75], "float32"), attention_mask=Mask(256, (2, 40), "bool"), return_dict=False),
        tiny=dict(in_channels=4, patch_size=2, context_in_dim=32, hidden_size=64, mlp_ratio=3.5, num_heads=4,
                  depth=3, axes_dim=[8, 8], bottleneck_size=12, resolution_embeds=True),
        tiny_inputs=dict(
            hidden_states=Normal((2, 4, 32, 32)), encoder_hidden_states=Normal((2, 16, 32)),
            timestep=Values([0.75, 0.25], "float32"), attention_mask=Mask(16, (16, 11), "bool"),
            return_dict=False),
    ),
}
