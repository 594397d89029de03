"""What a first call of a further shape does not do again, and what it does in one go."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.api import TracedProgram
from xdit_ir.emission.structure import program_key
from xdit_ir.ir.program import Program
from xdit_ir.passes import base

MODEL = "plain-mmdit:tiny"


def resized(example: dict[str, Any], size: int, text: int) -> dict[str, Any]:
    """The arguments for another image and text."""
    x, words = example["x"], example["text"]
    shapes = {"x": (*x.shape[:-2], size, size), "text": (len(words), text, words.shape[-1])}
    return example | {name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The passes after which a program is verified."""
    names: list[str] = []
    real: Any = base.verify

    def verify(program: Program, name: str, **given: Any) -> None:
        names.append(name)
        real(program, name, **given)

    monkeypatch.setattr(base, "verify", verify)
    return names


@torch.no_grad()
def test_a_ranks_program_is_verified_after_every_pass_once_and_then_at_its_end(verified: list[str]) -> None:
    model, example = models.load(MODEL)
    port = xir.port(model)
    port(**resized(example, 12, 20))
    first = list(verified)
    verified.clear()
    given = resized(example, 16, 30)
    torch.testing.assert_close(port(**given), model(**given), rtol=1e-5, atol=1e-5)
    assert len(first) > len(verified) > 0
    assert set(verified) < set(first) and first[-1] == verified[-1]
    assert len(verified) == len(set(verified)), "each run of passes is verified at its end"


def test_programs_of_a_rank_have_one_structure_for_all_sizes_but_not_for_all_degrees() -> None:
    model, example = models.load(MODEL)
    traced = [TracedProgram(xir.trace(model, resized(example, *shape)).ir) for shape in ((12, 20), (16, 30))]
    keys = [
        [program_key(one.parallelize(ulysses=ulysses, ring=ring).rank(0)) for one in traced]
        for ulysses, ring in ((2, 1), (1, 2))
    ]
    assert all(key is not None for one in keys for key in one)
    assert all(first == second for first, second in keys)
    assert keys[0][0] != keys[1][0]


@pytest.mark.parametrize("fails", [False, True])
@torch.no_grad()
def test_the_collector_looks_once_at_what_a_first_call_makes(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """When that is over, with results or without; a call that was made before does not stop it."""
    model, example = models.load(MODEL)
    port, ran = xir.port(model), list[str]()

    def note(phase: str, info: Any) -> None:
        if phase == "start":
            ran.append("collected")

    def forward(*_: Any) -> Any:
        ran.append("run")
        if fails:
            raise RuntimeError("no")
        return real(*_)

    port(**resized(example, 12, 20))
    kind = type(port._xdit_specialisations.found[0].runner)
    real = kind.run
    monkeypatch.setattr(kind, "run", forward)
    gc.collect()
    gc.callbacks.append(note)
    try:
        port(**resized(example, 16, 30))
    except RuntimeError:
        assert fails
    finally:
        gc.callbacks.remove(note)
    assert ran[0] == "run" and ran.count("collected") <= 1
    assert gc.isenabled()


def test_calls_in_blocks_are_seen_by_what_they_are_given() -> None:
    """What is known of a block for all its calls says nothing of one of them."""
    model, example = models.load(MODEL)
    program = xir.trace(model, example).parallelize(ulysses=2).ir
    calls = list(program.calls)
    assert len(calls) > 1 and isinstance(model, nn.Module)
    name, prefix, values, weights = calls[-1].args
    calls[-1].args = (name, prefix, values, dict(reversed(list(weights.items()))))  # type: ignore[union-attr]
    with pytest.raises(xir.errors.VerifyError, match="in this order"):
        base.verify(program, "a rewrite")


def test_the_copy_that_was_traced_goes_without_the_collector() -> None:
    """Thousands of modules that refer to each other would be looked through at the end of each first call."""
    model, example = models.load(MODEL)

    def there() -> int:
        return sum(type(one) is nn.Linear for one in gc.get_objects())

    gc.collect()
    before = there()
    gc.disable()
    try:
        program = xir.trace(model, example)
        assert there() == before
    finally:
        gc.enable()
    assert program.ir.blocks
