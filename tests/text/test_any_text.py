"""Whatever a text says: it is a program that verifies, or a `ParseError` or `VerifyError`; and it runs no code."""

from __future__ import annotations

import random
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import xdit_ir as xir
from xdit_ir.errors import ParseError
from xdit_ir.ir.program import Program
from xdit_ir.sharding.verify import verify
from xdit_ir.text import parse, write

BASE = """program P {
  input %x: f32[2, 4, 8]
  %b: f32[2, 4, 8] = silu(%x) at a.b 'f.py:1: y'
  return %b
}
weights {
  w: f32[3]
}
signature {
  arguments {'x': *}
  leaf 'x': f32[2, 4, 8]
  results *
  results are [0]
}
"""
DIVIDED = BASE.replace("program P {", "program P on ulysses=2 {")
LATER = "block A(%x: f32[2]) {\n  %y = B<p>(%x)\n  return %y\n}\nblock B(%x: f32[2]) {\n  %y: f32[2] = silu(%x)\n"


def changed(old: str, new: str, base: str = BASE) -> str:
    assert old in base
    return base.replace(old, new)


WRONG = {
    "NUL in a string": changed("'f.py:1: y'", "'f.py\x00'"),
    "escape cut off": changed("silu(%x)", r"silu(%x, '\x')"),
    "list as a key": changed("silu(%x)", "silu(%x, {[1]: 2})"),
    "strings in a tensor": changed("silu(%x)", "silu(%x, tensor i64[1] ['a'])"),
    "call of a later block": changed("silu(%x)", "B<p>(%x)"),
    "call of a later block in a block": LATER + "  return %y\n}\n" + BASE,
    "place of a result": changed("  return %b", "  %c: f32[1] = %b[99999999999999999999]\n  return %b", DIVIDED),
    "nested brackets": changed("silu(%x)", f"silu(%x, {'(' * 100_000})"),
    "huge mesh": changed("program P {", "program P on ulysses=1000000 {"),
    "huge divided dim": changed("f32[2, 4, 8] = silu", "f32[2, 99999999999999/ulysses, 8] = silu", DIVIDED),
    "huge partition": changed("4, 8] = silu", "4/ulysses#0, 8] = silu", DIVIDED)
    + "partitions {\n  #0: 4 = 0:99999999999 | 0:4\n}\n",
    "too few parts": changed("4, 8] = silu", "4/ulysses#0, 8] = silu", DIVIDED) + "partitions {\n  #0: 4 = 0:4\n}\n",
    "number of 5000 digits": changed("silu(%x)", f"silu(%x, {'9' * 5000})"),
    "device that is none": BASE + "device 'cpu'\n",
    "guard of a list": changed("  results *", "  guard 'x' = {[]: 1} because 'x'\n  results *"),
    "record as a target": changed("silu(%x)", "Landing{shape: (1,), places: ()}(%x)"),
}
CODE = {
    "a module": "import_module::__call__.__call__('xdit_evil')",
    "a library": "load_library::__call__.__call__('x.so')",
    "loaded libraries": "loaded_libraries::add.__call__('xdit_evil')",
    "a namespace's own attribute": "aten::__class__.__call__('xdit_evil')",
    "an operator's own attribute": "add.__class__('xdit_evil')",
    "what lists overloads": "add.overloads()",
    "a tensor": "$sha256:0('xdit_evil')",
}
TREES = {
    "the members of an enum": '[1, {"type": "builtins.dict", "context": "[{\\"__enum__\\": true, \\"fqn\\": '
    '\\"xdit_evil:A\\", \\"name\\": \\"b\\"}]", "children_spec": []}]',
    "the same, escaped": '[1, {"type": "builtins.dict", "context": "[{\\"\\\\u005f_enum__\\": true, \\"fqn\\": '
    '\\"xdit_evil:A\\", \\"name\\": \\"b\\"}]", "children_spec": []}]',
    "what makes missing entries": '[1, {"type": "collections.defaultdict", "context": {"default_factory_module": '
    '"xdit_evil", "default_factory_name": "x", "dict_context": []}, "children_spec": []}]',
    "a plain factory elsewhere": '[1, {"type": "collections.defaultdict", "context": {"default_factory_module": '
    '"xdit_evil", "default_factory_name": "list", "dict_context": []}, "children_spec": []}]',
    "no tree": "[1]",
    "nothing": "",
}


@contextmanager
def limit(seconds: int) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise TimeoutError(f"no answer within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def read(text: str) -> None:
    verify(parse(text, {"sha256:0": torch.zeros(1)}), "reading")


@pytest.mark.parametrize("name", WRONG)
def test_wrong_texts_are_refused(name: str) -> None:
    with limit(10), pytest.raises((ParseError, xir.VerifyError)):
        read(WRONG[name])


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module `xdit_evil` that must not be imported."""
    (tmp_path / "xdit_evil.py").write_text("class A: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    assert "xdit_evil" not in sys.modules


@pytest.mark.usefixtures("evil")
@pytest.mark.parametrize("name", CODE)
def test_a_text_names_operators_only(name: str) -> None:
    with pytest.raises(ParseError, match="line 3"):
        read(changed("silu(%x)", CODE[name]))


@pytest.mark.usefixtures("evil")
@pytest.mark.parametrize("name", TREES)
def test_a_tree_of_arguments_names_no_code(name: str) -> None:
    with pytest.raises(ParseError):
        read(changed("arguments {'x': *}", f"arguments pytree {TREES[name]!r}"))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x: torch.Tensor, lengths: torch.Tensor, flip: bool = False) -> dict[str, torch.Tensor]:
        x = (x.flip(-1) if flip else x)[:, : int(lengths.max())]
        for layer in self.layers:
            x = layer(x)
        return {"sample": x * (torch.arange(x.shape[1]) < 3)[:, None]}


def programs() -> list[Program]:
    traced = xir.trace(Model(), {"x": torch.randn(2, 6, 8), "lengths": torch.tensor([3, 6])})
    found = [traced.ir, traced.analysed]
    for degrees in ({"ulysses": 2}, {"ring": 2}, {"cfg": 2, "ulysses": 3}):
        parallel = traced.parallelize(**degrees)
        found += [parallel.ir, parallel.rank(1)]
    return [*found, traced.parallelize(pipefusion=2).ir]


def mutations(chance: random.Random, texts: list[str]) -> Iterator[str]:
    """Texts with one to three changes of lines, words or characters."""
    words = sorted({word for text in texts for word in re.findall(r"[\w.]+|\S", text)})
    words += ["9" * 30, "-1", "0", "1e999", "nan", "\x00", "\\x", "'", "{", "((((", "$a", "#9", "None", "é", "\ud800"]
    while True:
        text = chance.choice(texts)
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            text = chance.choice(CHANGES)(chance, text, words)
        yield text


def other_lines(chance: random.Random, text: str, words: list[str]) -> str:
    lines = text.split("\n")
    at, to = chance.randrange(len(lines)), chance.randrange(len(lines))
    how = chance.randrange(4)
    if how == 0:
        del lines[at]
    elif how == 1:
        lines.insert(to, lines[at])
    elif how == 2:
        lines[at], lines[to] = lines[to], lines[at]
    else:
        del lines[at:]
    return "\n".join(lines)


def other_word(chance: random.Random, text: str, words: list[str]) -> str:
    places = list(re.finditer(r"[\w.]+|\S", text))
    if not places:
        return text
    place = chance.choice(places)
    return text[: place.start()] + chance.choice([*words[:1], chance.choice(words), ""]) + text[place.end() :]


def other_character(chance: random.Random, text: str, words: list[str]) -> str:
    at = chance.randrange(len(text) + 1)
    return text[:at] + chance.choice(["", chr(chance.randrange(1, 128))]) + text[at + chance.randrange(2) :]


CHANGES: tuple[Callable[[random.Random, str, list[str]], str], ...] = (other_lines, other_word, other_character)


def test_any_text_is_a_program_or_refused(request: pytest.FixtureRequest) -> None:
    """`--fuzz-texts N` tries N mutations, other ones at every run."""
    count = request.config.getoption("--fuzz-texts")
    seed = random.randrange(1 << 32) if count else 0
    texts = [write(program) for program in programs()]
    attachments = {key: item for text in texts for key, item in text.attachments.items()}
    accepted = 0
    changed_texts = mutations(random.Random(seed), [one.text for one in texts])
    for number, text in zip(range(count or 150), changed_texts, strict=False):
        try:
            with limit(10):
                verify(parse(text, attachments), "reading")
            accepted += 1
        except (ParseError, xir.VerifyError):
            pass
        except BaseException:
            print(f"seed {seed}, mutation {number}:\n{text}")
            raise
    assert accepted < (count or 150)
