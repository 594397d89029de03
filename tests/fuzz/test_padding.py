"""Random models with padded words: what is trimmed changes nothing, whatever padding holds. `--fuzz N` tries N more."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import xdit_ir as xir
from xdit_ir.errors import MismatchError
from xdit_ir.ir.difference import relative_error

FEW = 8
WIDTH, WORDS, TOKENS, ROWS = 16, 24, 10, (4, 5, 8)
CHOICES: dict[str, tuple[Any, ...]] = {
    "order": ("before", "behind", "between", "cross"),
    "hides": (False, float("-inf"), torch.finfo(torch.float32).min, -1000.0, None),
    "refined": ("not", "by keys", "by pairs", "causally", "openly"),
    "read": ("not", "not", "mean of real", "first", "last", "mean", "largest"),
    "returned": ("tokens", "tokens", "tokens", "a word", "all"),
    "written_out": (False, True),
    "emptied": (False, False, True),
    "turned": (False, False, False, True),
}
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Padded(nn.Module):
    """One of each of the choices."""

    def __init__(self, chosen: dict[str, Any]) -> None:
        super().__init__()
        self.c, self.places, self.marks = chosen, nn.Parameter(torch.randn(WORDS, WIDTH)), torch.randn(3, WIDTH)
        self.embed, self.text, self.pool, self.head = (nn.Linear(n, WIDTH) for n in (4, WIDTH, WIDTH, WIDTH))
        self.qkv, self.out = (nn.ModuleList(nn.Linear(WIDTH, n * WIDTH) for _ in range(3)) for n in (3, 1))

    def attend(self, at: int, x: torch.Tensor, source: torch.Tensor, mask: Any, causal: bool = False) -> torch.Tensor:
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in self.qkv[at](x).chunk(3, -1))
        if source is not x:
            k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in self.qkv[at](source).chunk(3, -1)[1:])
        if self.c["written_out"] and not causal:
            scores = q @ k.mT * q.shape[-1] ** -0.5
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
            y = scores.softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
        return x + self.out[at](y.transpose(1, 2).flatten(2))

    def hidden(self, keys: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
        number = self.c["hides"]
        if number is None or number is False:
            return keys if number is False else None
        return torch.zeros(keys.shape, dtype=x.dtype).masked_fill(~keys, number)

    def forward(self, x: torch.Tensor, words: torch.Tensor, mask: torch.Tensor) -> Any:
        c, real = self.c, mask.bool()
        weight = mask.to(words.dtype)[..., None]
        reads = {
            "mean of real": lambda: (words * weight).sum(1) / weight.sum(1),
            "first": lambda: words[:, 0],
            "last": lambda: words[:, -1],
            "mean": lambda: words.mean(1),
            "largest": lambda: words.amax(1),
        }
        pooled = reads[c["read"]]() if c["read"] in reads else None
        words = self.text(words * weight if c["emptied"] else words) + self.places
        words = words.flip(1) * 2 if c["turned"] else words
        keys = (real.flip(1) if c["turned"] else real)[:, None, None]
        pairs = (keys & keys.mT) | (torch.arange(WORDS) == 0)
        if c["refined"] != "not":
            words = self.attend(
                0, words, words, {"by keys": keys, "by pairs": pairs}.get(c["refined"]), c["refined"] == "causally"
            )
        x = self.embed(x) if pooled is None else self.embed(x) + self.pool(pooled)[:, None]
        first = {"before": 0, "behind": TOKENS, "between": 3}.get(c["order"])
        if first is None:
            for at in (1, 2):
                x = self.attend(at, x, words, self.hidden(keys, x))
        else:
            marks = self.marks.to(x.dtype).expand(len(x), -1, -1)
            parts = {0: (words, x), TOKENS: (x, words), 3: (marks, words, x)}[first]
            joint = torch.cat(parts, dim=1)
            seen = self.hidden(F.pad(keys, (first, joint.shape[1] - first - WORDS), value=True), x)
            for at in (1, 2):
                joint = self.attend(at, joint, joint, seen)
            words = joint[:, first : first + WORDS]
            x = joint[:, :TOKENS] if first == TOKENS else joint[:, -TOKENS:]
        x = self.head(x)
        return {"tokens": x, "a word": x + words[:, 0].mean(), "all": (x, words)}[c["returned"]]


def inputs(draw: random.Random, lengths: tuple[int, int]) -> Inputs:
    """Padding holds large numbers."""
    generator = torch.Generator().manual_seed(draw.randrange(1 << 30))
    x, words = (
        torch.randn(2, n, width, generator=generator, dtype=torch.float64) for n, width in ((TOKENS, 4), (WORDS, WIDTH))
    )
    real = torch.arange(WORDS) < torch.tensor(lengths)[:, None]
    return x, torch.where(real[..., None], words, 100 * words), real.long()


def judge(seed: int) -> bool:
    """Whether something was trimmed; raises where that makes a difference, or another length is taken."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    model = Padded({name: draw.choice(values) for name, values in CHOICES.items()}).double().eval()
    rows, longest = draw.choice(ROWS), draw.randint(1, WORDS)
    degrees = draw.choice([{}, {"ulysses": 2}, {"ring": 2}])
    traced = xir.trace(model, inputs(draw, (longest, draw.randint(1, longest))))
    parallel = traced.parallelize(**degrees, trim_padding=rows)
    fits = -(-longest // rows) * rows
    for length in (longest, min(fits, WORDS), fits - rows + 1):
        given = inputs(draw, (draw.randint(1, length), length))
        with torch.no_grad():
            want = model(*given)
        for got in parallel.simulate(model, given):
            pairs = zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]
            assert all(relative_error([one], [other]) < 1e-9 for one, other in pairs), f"{seed}: {model.c}"
    trimmed = any("not computed" in fact.reason for fact in parallel.original.signature.predicates)
    if trimmed and fits < WORDS:
        with pytest.raises(MismatchError):
            parallel.simulate(model, inputs(draw, (fits + 1, 1)))
    return trimmed


def test_random_models_with_padded_words(request: pytest.FixtureRequest) -> None:
    count: int = request.config.getoption("--fuzz")
    first = random.randrange(1 << 30) if count else 0
    trimmed = [judge(seed) for seed in range(first, first + (count or FEW))]
    assert count or (any(trimmed) and not all(trimmed))
