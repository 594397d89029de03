"""Z-Image: lists of samples, refiners of image and text before one joint sequence, padded to multiples of 32."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Normal, Values

SMALL = dict(in_channels=4, dim=64, n_layers=3, n_refiner_layers=2, n_heads=4, n_kv_heads=4, cap_feat_dim=32,
             axes_dims=[4, 6, 6], axes_lens=[256, 32, 32])

ENTRIES = {
    "z-image": Entry(
        cls="ZImageTransformer2DModel",
        full=dict(in_channels=16, dim=3840, n_layers=30, n_refiner_layers=2, n_heads=30, n_kv_heads=30,
                  cap_feat_dim=2560, axes_dims=[32, 48, 48], axes_lens=[1024, 512, 512]),
        full_inputs=dict(  # 1024 x 1024; a guidance pair
            x=[Normal((16, 1, 128, 128))] * 2, t=Values([0.75, 0.75]),
            cap_feats=[Normal((80, 2560)), Normal((20, 2560))], return_dict=False),
        tiny=SMALL,
        tiny_inputs=dict(
            x=[Normal((4, 1, 32, 32))] * 2, t=Values([0.75, 0.25]),
            cap_feats=[Normal((40, 32)), Normal((11, 32))], return_dict=False),
    ),
    "z-image-omni": Entry(  # condition images before the target, and their features from a vision encoder
        cls="ZImageTransformer2DModel",
        tiny=dict(**SMALL, siglip_feat_dim=24),
        tiny_inputs=dict(
            x=[[Normal((4, 1, 16, 16)), Normal((4, 1, 32, 32))] for _ in range(2)], t=Values([0.75, 0.25]),
            cap_feats=[[Normal((16, 32)), Normal((40, 32)), Normal((3, 32))],
                       [Normal((11, 32)), Normal((16, 32)), Normal((3, 32))]],
            siglip_feats=[[Normal((4, 4, 24)), None] for _ in range(2)],
            image_noise_mask=[[0, 1], [0, 1]], return_dict=False),
    ),
}
