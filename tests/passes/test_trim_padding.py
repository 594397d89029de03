"""Padding that a mask makes idle is not computed: what is left out changes nothing, and what could is left alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._ops import OpOverload

import xdit_ir as xir
from xdit_ir import models, text
from xdit_ir.checking.check import check_parallel
from xdit_ir.degrees import parse
from xdit_ir.errors import MismatchError, ParallelizeError
from xdit_ir.ir.difference import relative_error
from xdit_ir.ir.graphs import all_graphs
from xdit_ir.ir.program import SPEC
from xdit_ir.models.kinds.balance import MaskedText
from xdit_ir.models.kinds.padding import HiddenByLowest, LengthsOfText, PooledText
from xdit_ir.passes.emit import type_of

WORDS, WIDTH = 256, 32
DEGREES = [degrees.as_dict() for degrees in parse("u2,c2,r2,u2r2,u4")]
TRIMMED = ("kind-masked-text", "kind-lengths-of-text", "kind-pooled-text", "kind-hidden-by-lowest")
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def inputs(*lengths: int, seed: int = 0) -> Inputs:
    """Tokens, words and a mask of which are real: as many as `lengths` say in each sample."""
    generator = torch.Generator().manual_seed(seed)
    x, words = (torch.randn(len(lengths), n, width, generator=generator) for n, width in ((64, 4), (WORDS, WIDTH)))
    return x, words, (torch.arange(WORDS) < torch.tensor(lengths)[:, None]).long()


def told(traced: xir.TracedProgram, rows: int = 64) -> list[str]:
    """What is trimmed to multiples of so many rows."""
    return [fact.reason for fact in traced.trimmed(rows).ir.signature.predicates]


@functools.cache
def traced(name: str) -> xir.TracedProgram:
    """A kind, traced."""
    return xir.trace(*models.load(f"{name}:tiny"))


@pytest.mark.parametrize("name", TRIMMED)
def test_what_is_left_out_changes_nothing(name: str, pytestconfig: pytest.Config) -> None:
    model, example = models.load(f"{name}:tiny")
    assert told(traced(name)) == ["words[:, 64:] is padding, which is not computed"]
    everything, first = pytestconfig.getoption("--zoo-all"), TRIMMED.index(name)
    for degrees in DEGREES if everything else DEGREES[first : first + 1]:
        parallel = traced(name).parallelize(**degrees, trim_padding=True)
        assert check_parallel(parallel, model, example).ok, degrees
        assert parallel.report().share <= 0.55 * traced(name).parallelize(**degrees).report().share


@pytest.mark.parametrize("name", TRIMMED)
def test_operators_are_those_that_give_what_stands_there(name: str) -> None:
    made = traced(name).trimmed(64).canonical
    assert made is not None
    for _, graph, _ in all_graphs(made):
        for node in (node for node in graph.nodes if isinstance(node.target, OpOverload)):
            assert type_of(node) == node.meta[SPEC]


@pytest.mark.parametrize("name", ["kind-hidden-by-thousands", "kind-returned-text"])
def test_what_cannot_be_shown_stays(name: str) -> None:
    assert told(traced(name)) == []
    assert str(traced(name).parallelize(ulysses=2, trim_padding=True)) == str(traced(name).parallelize(ulysses=2))


class Reads(MaskedText):
    """Beside what masks leave, `use` of all words."""

    def __init__(self, use: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.use, self.conv = use, nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: torch.Tensor, words: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """As for `MaskedText`."""
        found: torch.Tensor = super().forward(x, words, mask) + self.use(words).sum()
        return found


@pytest.mark.parametrize(
    "use",
    [
        lambda words: words[:, -1],
        lambda words: words.mean(1),
        lambda words: words.amax(1),
        lambda words: words.cumsum(1)[:, 70],
        lambda words: words.sort(1).values[:, 0],
        lambda words: torch.randn_like(words[:, :1]),
    ],
)
def test_whatever_else_reads_the_words_keeps_them(use: Callable[[torch.Tensor], torch.Tensor]) -> None:
    assert told(xir.trace(Reads(use), inputs(20, 9))) == []


@pytest.mark.parametrize("use", [lambda words: words[:, 0], lambda words: words[:, :60].mean(1)])
def test_what_reads_real_words_only_does_not(use: Callable[[torch.Tensor], torch.Tensor]) -> None:
    model = Reads(use)
    assert told(xir.trace(model, inputs(20, 9)))
    assert xir.check(model, inputs(20, 9), ulysses=2, trim_padding=True).ok


class Convolved(MaskedText):
    """A convolution looks one word further."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: torch.Tensor, words: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """As for `MaskedText`."""
        return super().forward(x, self.conv(words.mT).mT, mask)


def test_a_word_that_looks_at_the_next_one_needs_it() -> None:
    assert told(xir.trace(Convolved(), inputs(20, 9))) == []


class Causal(MaskedText):
    """Words see words before them, by a decoder; `sees` says which of them the tokens see."""

    def __init__(self, sees: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.sees, self.qkv = sees, nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: torch.Tensor, words: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """As for `MaskedText`."""
        q, k, v = self.qkv(words).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        words = words + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return super().forward(x, self.sees(words), mask)


def test_words_that_come_later_are_not_seen() -> None:
    model = Causal(lambda words: words)
    assert told(xir.trace(model, inputs(20, 9))) == ["words[:, 64:] is padding, which is not computed"]
    assert xir.check(model, inputs(20, 9), ulysses=2, trim_padding=True).ok
    assert told(xir.trace(Causal(lambda words: words.flip(1)), inputs(20, 9))) == []


@pytest.mark.parametrize(
    ("lengths", "kept"), [((1, 1), 64), ((64, 9), 64), ((65, 9), 128), ((9, 192), 192), ((193, 1), 256), ((0, 0), 64)]
)
def test_the_longest_of_the_batch_is_kept(lengths: tuple[int, int], kept: int) -> None:
    [said] = told(xir.trace(MaskedText(), inputs(*lengths)))
    assert said == (
        "there is little padding in words" if kept == WORDS else f"words[:, {kept}:] is padding, which is not computed"
    )


def test_holes_before_the_last_real_word_stay() -> None:
    model, (x, words, mask) = PooledText(), inputs(100, 9)
    mask[:, 10:90] = 0
    assert told(xir.trace(model, (x, words, mask))) == ["words[:, 128:] is padding, which is not computed"]
    assert xir.check(model, (x, words, mask), ring=2, trim_padding=True).ok


def test_real_words_at_the_end_keep_all() -> None:
    x, words, mask = inputs(100, 9)
    assert told(xir.trace(MaskedText(), (x, words, mask.flip(1)))) == ["there is little padding in words"]


@pytest.mark.parametrize("kind", [MaskedText, PooledText, HiddenByLowest])
def test_programs_serve_prompts_of_their_length(kind: Callable[[], nn.Module], pytestconfig: pytest.Config) -> None:
    """20 prompts: a program for each multiple of 64 words that comes, and each prompt gets its own."""
    if kind is not MaskedText and not pytestconfig.getoption("--zoo-all"):
        pytest.skip("runs with --zoo-all")
    model = kind().eval()
    ported = xir.port(model, ulysses=1, trim_padding=True)
    lengths = torch.randint(1, WORDS + 1, (20,), generator=torch.Generator().manual_seed(0)).tolist()
    made: list[int] = []
    for seed, length in enumerate(lengths):
        given = inputs(length, max(length // 2, 1), seed=seed)
        with torch.no_grad():
            assert relative_error([ported(*given)], [model(*given)]) < 1e-5
        made.append(-(-length // 64))
    assert len(ported.programs) == len(set(made)) == 4


def test_a_longer_prompt_is_no_input_of_the_program() -> None:
    model = LengthsOfText()
    x, words, mask = inputs(20, 9)
    parallel = xir.trace(model, (x, words, mask.sum(1))).parallelize(ulysses=2, trim_padding=True)
    for longer in (65, 256):
        with pytest.raises(MismatchError, match=r"lengths: .*words\[:, 64:\] is padding"):
            parallel.simulate(model, (x, words, torch.tensor([longer, 9])))
    [one, _] = parallel.simulate(model, (x, words, torch.tensor([64, 33])))
    assert relative_error([one], [model(x, words, torch.tensor([64, 33]))]) < 1e-5


def test_the_report_says_what_is_not_computed() -> None:
    parallel = traced("kind-masked-text").parallelize(ulysses=2, trim_padding=True)
    assert "words[:, 64:] is padding, which is not computed" in str(parallel.report())


@pytest.mark.parametrize("option", [0, -64, 1.5, "64", None])
def test_other_options_are_refused(option: Any) -> None:
    with pytest.raises(ParallelizeError, match=r"trim_padding=.*nearest legal: 64"):
        xir.port(MaskedText(), ulysses=1, trim_padding=option)


def test_stages_get_padding_as_little() -> None:
    model, example = models.load("kind-masked-text:tiny")
    assert xir.check(model, example, pipefusion=2, trim_padding=True).ok


def test_text_of_a_trimmed_program_is_read_back() -> None:
    made = traced("kind-pooled-text").trimmed(64).canonical
    assert made is not None
    written = text.write(made)
    assert text.difference(made, text.parse(written.text, written.attachments)) is None
