"""Models of `models.plain`, outside any library: the styles of research code, in the papers' sizes."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Integers, Mask, Normal, Values

PLAIN = "xdit_ir.models.plain"

ENTRIES = {
    "plain-dit": Entry(
        cls=f"{PLAIN}.dit:DiT",
        full=dict(size=64, patch=2, channels=4, width=1152, depth=28, heads=16, classes=1000),
        full_inputs=dict(  # 512 x 512; a guidance pair
            x=Normal((2, 4, 64, 64)), t=Values([750, 750], "int64"), y=Values([207, 1000], "int64")),
        tiny=dict(size=32, patch=2, channels=4, width=64, depth=3, heads=4, classes=10),
        tiny_inputs=dict(x=Normal((2, 4, 32, 32)), t=Values([750, 250], "int64"), y=Integers((2,), 11)),
    ),
    "plain-uvit": Entry(
        cls=f"{PLAIN}.uvit:UViT",
        full=dict(img_size=32, patch_size=2, in_chans=4, embed_dim=1152, depth=29, num_heads=16, clip_dim=768,
                  num_clip_token=77),
        full_inputs=dict(  # 256 x 256; a guidance pair
            x=Normal((2, 4, 32, 32)), timesteps=Values([750.0, 750.0], "float32"), context=Normal((2, 77, 768))),
        tiny=dict(img_size=32, patch_size=2, in_chans=4, embed_dim=64, depth=5, num_heads=4, clip_dim=32,
                  num_clip_token=16),
        tiny_inputs=dict(
            x=Normal((2, 4, 32, 32)), timesteps=Values([750.0, 250.0], "float32"), context=Normal((2, 16, 32))),
    ),
    "plain-mmdit": Entry(
        cls=f"{PLAIN}.mmdit:MMDiT",
        full=dict(channels=16, patch=2, dim=1536, depth=24, heads=24, text_dim=4096, pooled_dim=2048),
        full_inputs=dict(  # 1024 x 1024; a guidance pair
            x=Normal((2, 16, 128, 128)), t=Values([0.75, 0.75]), text=Normal((2, 154, 4096)),
            pooled=Normal((2, 2048))),
        tiny=dict(channels=4, patch=2, dim=64, depth=3, heads=4, text_dim=32, pooled_dim=24),
        tiny_inputs=dict(
            x=Normal((2, 4, 24, 44)), t=Values([0.75, 0.25]), text=Normal((2, 16, 32)), pooled=Normal((2, 24))),
    ),
    "plain-stdit": Entry(
        cls=f"{PLAIN}.stdit:STDiT",
        full=dict(channels=4, patch=(1, 2, 2), width=1152, depth=28, heads=16, text_dim=4096),
        full_inputs=dict(  # 512 x 512, 16 latent frames; a guidance pair
            x=Normal((2, 4, 16, 64, 64)), timestep=Values([750.0, 750.0], "float32"), y=Normal((2, 120, 4096)),
            mask=Mask(120, (80, 1))),
        tiny=dict(channels=4, patch=(1, 2, 2), width=64, depth=2, heads=4, text_dim=32),
        tiny_inputs=dict(
            x=Normal((2, 4, 5, 16, 16)), timestep=Values([750.0, 250.0], "float32"), y=Normal((2, 16, 32)),
            mask=Mask(16, (16, 11))),
    ),
    "plain-linear-dit": Entry(
        cls=f"{PLAIN}.linear_dit:LinearDiT",
        full=dict(channels=32, width=2240, depth=20, head_dim=32, cross_heads=20, text_dim=2304),
        full_inputs=dict(  # 1024 x 1024; a guidance pair
            x=Normal((2, 32, 32, 32)), timestep=Values([750.0, 750.0], "float32"), y=Normal((2, 300, 2304)),
            mask=Mask(300, (120, 1))),
        tiny=dict(channels=8, width=64, depth=3, head_dim=16, cross_heads=4, text_dim=32),
        tiny_inputs=dict(
            x=Normal((2, 8, 18, 15)), timestep=Values([750.0, 250.0], "float32"), y=Normal((2, 16, 32)),
            mask=Mask(16, (16, 11))),
    ),
    "plain-packed-dit": Entry(
        cls=f"{PLAIN}.packed_dit:PackedDiT",
        full=dict(channels=16, patch=2, width=2304, depth=26, refiners=2, heads=24, kv_heads=8, axes=(32, 32, 32),
                  text_dim=2304),
        full_inputs=dict(  # 1024 x 1024 and 1344 x 768
            x=[Normal((16, 128, 128)), Normal((16, 168, 96))], t=Values([0.75, 0.75]),
            caps=[Normal((100, 2304)), Normal((40, 2304))]),
        tiny=dict(channels=4, patch=2, width=64, depth=3, refiners=2, heads=4, kv_heads=2, axes=(4, 6, 6),
                  text_dim=32),
        tiny_inputs=dict(
            x=[Normal((4, 32, 32)), Normal((4, 40, 28))], t=Values([0.75, 0.25]),
            caps=[Normal((16, 32)), Normal((11, 32))]),
    ),
}
