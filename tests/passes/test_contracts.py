"""What passes declare, and what is said of a program that lacks what a pass requires."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import pytest

from xdit_ir.caching.rule import Watched
from xdit_ir.errors import PassError
from xdit_ir.ir.facts import Fact
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.program import Program
from xdit_ir.passes.base import run_passes
from xdit_ir.passes.contract import NUMERICS, contract_of
from xdit_ir.passes.keeping import Keeping
from xdit_ir.passes.order import (
    PASSES,
    analysis_passes,
    cache_passes,
    canonical_passes,
    mesh_passes,
    peer_passes,
    rank_passes,
    time_passes,
)
from xdit_ir.passes.registry import PassSpec, apply_passes, parse_passes
from xdit_ir.sharding.specialize import Specialize
from xdit_ir.text import difference, parse, write
from xdit_ir.tools.cli import main

OPTIONS = {"partition-stages": {"count": "2"}, "specialize": {"rank": "0"}, "own-parts": {"rank": "0"}}
MESH = Mesh.of(ulysses=2)
SCALE = """
program Scale {
  input %t: f32[8]
  %half: f32[8] = mul.Tensor(%t, 0.5)
  return %half
}
"""


def kinds(test: Callable[..., None]) -> Any:
    return pytest.mark.parametrize("kind", PASSES, ids=lambda kind: kind.name)(test)


def providers(fact: Fact) -> list[str]:
    return [kind.name for kind in PASSES if fact in contract_of(kind).provides]


@kinds
def test_every_pass_declares_what_it_is(kind: type[Any]) -> None:
    assert kind.numerics in NUMERICS and kind.__doc__
    assert "name" not in {field.name for field in fields(kind)}, "a name is no option"


def test_the_page_of_passes_has_them_in_their_order() -> None:
    page = (Path(__file__).parents[2] / "docs" / "passes.md").read_text()
    listed = re.findall(r"(?m)^\| `([\w-]+)` \| .* \| (\w+)(?: \(Ring\))? \|$", page)
    assert listed == [(kind.name, kind.numerics) for kind in PASSES]


@kinds
def test_what_a_pass_requires_an_earlier_one_provides(kind: type[Any]) -> None:
    earlier = PASSES[: PASSES.index(kind)]
    for fact in contract_of(kind).requires:
        assert any(fact in contract_of(one).provides for one in earlier), f"nothing before {kind.name} provides {fact}"


@kinds
def test_a_pass_that_runs_too_early_names_those_that_must_come_before(kind: type[Any]) -> None:
    bare = parse(SCALE)
    made = PassSpec(kind, OPTIONS.get(kind.name, {})).make(MESH)
    required = contract_of(kind).requires
    if not required:
        run_passes(bare, [made])
        return
    with pytest.raises(PassError, match=f"pass {kind.name} needs") as caught:
        run_passes(bare, [made])
    assert all(name in str(caught.value) for fact in required for name in providers(fact))


def test_lists_are_in_the_order_of_the_list_of_all_passes() -> None:
    places = {kind: place for place, kind in enumerate(PASSES)}
    patched = Mesh.of(pipefusion=2)
    rank = [Specialize(0), *rank_passes((9, 0), recorded=True, packed=True), *peer_passes(0)]
    divided = [*cache_passes(Watched.FIRST_BLOCK), *mesh_passes(MESH, keeping=Keeping(shard=True))]
    trimmed = [*canonical_passes(rows=64), *analysis_passes()[-1:]]
    timed, compiled = time_passes(patched, kv_cache_dtype="fp8_e4m3"), rank_passes((9, 0), compiled=True)
    for run in ([*analysis_passes(), *divided, *rank], [*analysis_passes(), *timed], trimmed, compiled):
        order = [places[type(one)] for one in run]
        assert order == sorted(order)
    used = {type(one) for one in (*trimmed, *divided, *timed, *rank, *compiled)}
    assert {kind.name for kind in set(PASSES) - used} == {"align-samples", "partition-stages"}, (
        "PipeFusion's, given apart"
    )


@pytest.mark.parametrize(
    ("passes", "said"),
    [
        ("shard-tokens{ulysses=2}", "pass shard-tokens needs a program with 'tokens', which find-tokens provides"),
        (
            "canonicalize,find-tokens,shard-tokens{ulysses=2},lower-attention",
            "lower-attention needs a program with 'layouts', which propagate-layouts provides",
        ),
        ("canonicalize,find-tokens,overlap{ulysses=2}", "'runnable', which split-statistics provides"),
        ("fuse-gelu", "'local', which specialize provides; passes before gave it nothing"),
    ],
)
def test_opt_says_what_is_missing(passes: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "scale.ir").write_text(SCALE)
    assert main(["opt", str(tmp_path / "scale.ir"), "--passes", passes]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in " ".join(err.split())


def test_facts_survive_the_text() -> None:
    """So that a list of passes can be run in two goes."""
    found = apply_passes(parse(SCALE), parse_passes("canonicalize,find-tokens"))
    assert found.facts == {Fact.CANONICAL, Fact.TOKENS}
    again = parse(write(found).text)
    assert again.facts == found.facts and difference(found, again) is None
    at_once = apply_passes(found, parse_passes("shard-tokens{ulysses=2},propagate-layouts"))
    assert difference(apply_passes(again, parse_passes("shard-tokens{ulysses=2},propagate-layouts")), at_once) is None
    assert difference(found, found.replace(facts=frozenset())) is not None


def test_a_text_by_hand_on_a_mesh_has_layouts() -> None:
    divided = SCALE.replace("Scale {", "Scale on ulysses=2 {")
    assert parse(divided).facts == {Fact.LAYOUTS}
    assert parse(f"{divided}\nfacts\n").facts == frozenset()


@dataclass(frozen=True)
class Rename:
    """A pass of a user that declares nothing; its name is a field."""

    name: str = "rename"

    def apply(self, program: Program) -> Program:
        return program.replace(name="Renamed")


@dataclass(frozen=True)
class Forget:
    """One that breaks what passes before it have found."""

    name: ClassVar[str] = "forget"
    invalidates: ClassVar[frozenset[Fact]] = frozenset({Fact.TOKENS})

    def apply(self, program: Program) -> Program:
        return program.replace(tokens=())


def test_passes_of_users() -> None:
    program = apply_passes(parse(SCALE), parse_passes("canonicalize,find-tokens"))
    assert run_passes(program, [Rename()]).facts == program.facts
    with pytest.raises(PassError, match="find-tokens"):
        run_passes(program, [Forget(), *mesh_passes(MESH)])
