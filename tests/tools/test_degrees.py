"""The short form of degrees: what it means, and what is suggested for what it does not."""

from __future__ import annotations

import pytest

from xdit_ir.degrees import Degrees, nearest, parse
from xdit_ir.errors import ParallelizeError
from xdit_ir.ir.mesh import MESH_DIMS


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("u2", [Degrees.of(ulysses=2)]),
        ("r3", [Degrees.of(ring=3)]),
        ("p2", [Degrees.of(pipefusion=2)]),
        ("c2u2r2", [Degrees.of(cfg=2, ring=2, ulysses=2)]),
        ("u16, c2", [Degrees.of(ulysses=16), Degrees.of(cfg=2)]),
        ("u2,r2,u2", [Degrees.of(ulysses=2), Degrees.of(ring=2)]),
        ("u1", [Degrees.of()]),
        ("p2m4u2", [Degrees.of(pipefusion=2, ulysses=2, patches=4)]),
    ],
)
def test_parse(text: str, expected: list[Degrees]) -> None:
    assert parse(text) == expected


def test_text_is_in_rank_order_and_parses_back() -> None:
    degrees = Degrees.of(cfg=2, pipefusion=3, ring=4, ulysses=5)
    assert tuple(degrees.as_dict()) == MESH_DIMS
    assert degrees.ranks == 120
    assert [str(degrees), str(Degrees.of())] == ["c2p3r4u5", "u1"]
    assert parse(str(degrees)) == [degrees]
    assert str(Degrees.of(pipefusion=2, patches=5)) == "p2m5"


@pytest.mark.parametrize(
    ("wrong", "suggested"),
    [
        ("2u", "u2"),
        ("U2", "u2"),
        ("u", "u2"),
        ("u0", "u1"),
        ("u2x3", "u2"),
        ("u2-r3", "r3u2"),
        ("ulysses=4", "u4"),
        ("ulyses4", "u4"),
        ("cfg2,ring:2", "c2,r2"),
        ("u2,,r2", "u2,r2"),
        ("u2u4", "u4"),
        ("", "u2"),
        ("7", "u2"),
    ],
)
def test_wrong_text_names_the_nearest_legal_one(wrong: str, suggested: str) -> None:
    with pytest.raises(ParallelizeError, match=f"nearest legal form is '{suggested}'"):
        parse(wrong)
    assert parse(nearest(wrong))


def test_numbers_of_any_length_are_answered() -> None:
    with pytest.raises(ParallelizeError, match="the nearest legal form is 'u999999999'"):
        parse("u" + "9" * 6000)
