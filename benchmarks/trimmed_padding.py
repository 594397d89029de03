"""What `trim_padding` leaves to do, without GPUs: `python benchmarks/trimmed_padding.py [--error] [NAME ...]`.

Tiny models of the zoo, with 64 to 256 tokens of image or video, are given 256 words, of which 20 and 9 are real. Prints
the part of one device's work that the slowest rank does under each set of degrees, before and after; with `--error`
also the largest relative error of any rank, of all that are simulated. `--published`, in its place: u2 and u4 of models
of published size, on the meta device, with the words that the zoo gives them.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.utils import _pytree as pytree

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.checking.check import check_parallel
from xdit_ir.degrees import parse

NAMES = (
    *("kind-masked-text", "kind-lengths-of-text", "kind-pooled-text", "kind-hidden-by-lowest", "hunyuanvideo"),
    *("qwen-image", "cosmos-1.0", "motif-video", "nucleus-image", "lumina-next", "prx-512", "dreamlite-block"),
)
DEGREES = parse("u2,u4,c2,r2,u2r2")
TEXT, WORDS, REAL = 16, 256, (20, 9)


def longer(leaf: Any) -> Any:
    """Text features [2, 16, ...], or a mask of them, for 256 words; anything else as it is."""
    if not isinstance(leaf, torch.Tensor) or leaf.shape[:2] != (2, TEXT) or leaf.dim() > 3:
        return leaf
    if leaf.dim() == 2:
        return (torch.arange(WORDS) < torch.tensor(REAL)[:, None]).to(leaf.dtype)
    return torch.randn(2, WORDS, leaf.shape[2], generator=torch.Generator().manual_seed(0)).to(leaf.dtype)


def main() -> None:
    names = [name for name in sys.argv[1:] if not name.startswith("-")] or NAMES
    for name in names:
        if published := "--published" in sys.argv:
            model, example = models.load(name, device="meta")
        else:
            model, example = models.load(f"{name}:tiny")
            example = pytree.tree_map(longer, example)
        traced, told = xir.trace(model, example), []
        for one in DEGREES[:2] if published else DEGREES:
            before = traced.parallelize(**one.as_dict()).report()
            made = traced.parallelize(**one.as_dict(), trim_padding=True)
            told.append(f"{one} {before.share:.3f} -> {made.report().share:.3f}")
            if "--error" in sys.argv:
                told[-1] += f" ({check_parallel(made, model, example).max_relative_error:.0e})"
        print(f"{name}: {', '.join(told)}", flush=True)


if __name__ == "__main__":
    main()
