"""AuraFlow: a few two-stream blocks, then one stream; eight learned tokens before the text."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Normal, Values

ENTRIES = {
    "auraflow-0.3": Entry(
        cls="AuraFlowTransformer2DModel",
        full=dict(sample_size=64, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=4,
                  num_single_dit_layers=32, attention_head_dim=256, num_attention_heads=12,
                  joint_attention_dim=2048, caption_projection_dim=3072, pos_embed_max_size=9216),
        full_inputs=dict(  # 1024 x 1024; a guidance pair
            hidden_states=Normal((2, 4, 128, 128)), encoder_hidden_states=Normal((2, 256, 2048)),
            timestep=Values([0.75, 0.75]), return_dict=False),
        tiny=dict(sample_size=32, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=2,
                  num_single_dit_layers=2, attention_head_dim=8, num_attention_heads=4,
                  joint_attention_dim=32, caption_projection_dim=32, pos_embed_max_size=400),
        tiny_inputs=dict(
            hidden_states=Normal((2, 4, 32, 32)), encoder_hidden_states=Normal((2, 16, 32)),
            timestep=Values([0.75, 0.25]), return_dict=False),
    ),
}
