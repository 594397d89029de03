"""PipeFusion's semantics on a plain model, independent of the IR: one full forward per patch, of which only the
patch's own rows count, with the keys and values of all other rows taken from a buffer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree


@dataclass
class DisplacedReference:
    """`patches[p]`: the image tokens of patch p; the `text` tokens of joint attention go with the first patch.

    `grid`: how the tokens lie (frames, rows, columns) in an output `[batch, channels, (frames,) height, width]`; None
    for an output `[batch, tokens, channels]`.
    """

    model: nn.Module
    patches: Sequence[torch.Tensor]
    text: int
    text_first: bool
    grid: tuple[int, ...] | None
    _buffers: list[list[torch.Tensor]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.patches))

    @torch.no_grad()
    def warmup(self, example: dict[str, Any]) -> torch.Tensor:
        """A synchronous step, which fills the buffers."""
        with self._attention(None):
            return self._run(example)

    @torch.no_grad()
    def step(self, example: dict[str, Any]) -> torch.Tensor:
        """A displaced step."""
        result = None
        for patch, tokens in enumerate(self.patches):
            with self._attention(patch):
                output = self._run(example)
            result = torch.full_like(output, torch.nan) if result is None else result
            mine = self._mask(tokens, output)
            result = torch.where(mine, output, result)
        assert result is not None
        return result

    def _run(self, example: dict[str, Any]) -> torch.Tensor:
        [output] = [leaf for leaf in pytree.tree_leaves(self.model(**example)) if isinstance(leaf, torch.Tensor)]
        return output

    def _rows(self, patch: int, keys: int) -> torch.Tensor:
        """Rows of an attention's keys that belong to a patch."""
        image = self.patches[patch]
        if keys == self.tokens:
            return image
        text = torch.arange(self.text) if patch == 0 else torch.arange(0)
        return torch.cat([text, image + self.text]) if self.text_first else torch.cat([image, text + self.tokens])

    def _mask(self, tokens: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(self.tokens, dtype=torch.bool)
        mask[tokens] = True
        if self.grid is None:
            return mask[None, :, None]
        mask = mask.reshape(self.grid)
        for dim, size in enumerate(output.shape[2:]):
            mask = mask.repeat_interleave(size // self.grid[dim], dim)
        return mask[None, None]

    @contextmanager
    def _attention(self, patch: int | None) -> Iterator[None]:
        original, call = F.scaled_dot_product_attention, 0

        def displaced(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            q, k, v = query, key, value
            nonlocal call
            if k.shape[-2] in (self.tokens, self.tokens + self.text):
                if patch is None:
                    self._buffers[call:] = [[k.clone(), v.clone()]]
                else:
                    rows = self._rows(patch, k.shape[-2])
                    for held, fresh in zip(self._buffers[call], (k, v), strict=True):
                        held[..., rows, :] = fresh[..., rows, :]
                    k, v = (held.clone() for held in self._buffers[call])
                call += 1
            return original(q, k, v, *args, **kwargs)

        F.scaled_dot_product_attention = displaced
        try:
            yield
        finally:
            F.scaled_dot_product_attention = original
