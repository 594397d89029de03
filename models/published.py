"""Which models of the zoo are run in their published sizes on GPUs, under which degrees, as data.

Each fits one GPU of 139 GiB in bf16 beside its activations, and a forward of it takes one such GPU from 30 ms to 7 s
(FLOPs at half of its speed), so that a comparison of both ends within a minute or two.
"""

from __future__ import annotations

PUBLISHED: dict[str, tuple[str, ...]] = {
    "u2": (
        *("allegro", "anyflow-14b", "auraflow-0.3", "chroma1-hd", "chronoedit-14b", "cogvideox-5b", "cogview3-plus-3b"),
        *("cogview4-6b", "easyanimate-5.1", "flux.1-dev", "flux.2-dev", "framepack-i2v", "glm-image", "helios"),
        *("hidream-i1", "hunyuandit", "hunyuanimage-2.1", "hunyuanvideo:540p", "latte-1", "longcat-image", "ltx-2"),
        *("ltx-video", "lumina-2", "lumina-next", "mochi-1", "ovis-image-7b", "pixart-sigma", "qwen-image"),
        *("sana-video-2b", "sd3.5-large", "skyreels-v2-df-1.3b", "wan2.1-t2v-1.3b", "wan2.1-t2v-14b"),
        *("wan2.1-vace-14b", "z-image"),
    ),
    # Those whose example is a guidance pair.
    "c2": (
        *("allegro", "auraflow-0.3", "cogvideox-5b", "cogview3-plus-3b", "easyanimate-5.1", "hidream-i1", "hunyuandit"),
        *("latte-1", "ltx-video", "lumina-next", "mochi-1", "pixart-sigma", "sana-video-2b", "sd3.5-large"),
    ),
}
