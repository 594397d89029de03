"""The mesh: dims by name, in the order that it says, and the one table of those that there usually are."""

from __future__ import annotations

import re

import pytest

from xdit_ir.errors import ParallelizeError
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import DIMS, FEATURES, MESH_DIMS, SEQUENCE, TIME, Mesh
from xdit_ir.ir.partition import Indices, Partition
from xdit_ir.ir.printer import dimension_text, mesh_text
from xdit_ir.ir.relayout import kind, plan

USUAL = Mesh.of(ring=2, ulysses=3)
TURNED = Mesh(("ulysses", "ring"), (3, 2))


def test_the_table_says_what_each_dim_divides() -> None:
    assert MESH_DIMS == ("cfg", "pipefusion", "ring", "ulysses", "tensor")
    assert TIME == "pipefusion" and SEQUENCE == ("ring", "ulysses") and FEATURES == ("tensor",)
    assert len({dim.letter for dim in DIMS}) == len(DIMS)


def test_dims_of_the_table_that_are_not_named_have_size_1() -> None:
    assert Mesh(("ulysses",), (2,)) == Mesh.of(ulysses=2) != Mesh.of(ring=2)
    assert Mesh() == Mesh.of() and Mesh().names == MESH_DIMS
    assert TURNED.names == ("cfg", "pipefusion", "ulysses", "tensor", "ring")
    assert Mesh(("expert",), (2,)).degrees == {**dict.fromkeys(MESH_DIMS, 1), "expert": 2}


@pytest.mark.parametrize("mesh", [USUAL, TURNED, Mesh(("expert", "cfg"), (2, 2))])
def test_coordinates_are_by_name(mesh: Mesh) -> None:
    assert [mesh.rank_at(mesh.coordinate(rank)) for rank in range(mesh.world_size)] == list(range(mesh.world_size))
    inner = next(name for name in reversed(mesh.names) if mesh.size((name,)) > 1)
    assert mesh.rank_at({inner: 1}) == 1, "the innermost dim is counted through first"


def test_another_size_of_one_dim() -> None:
    longer = TURNED.resized(TIME, 4)
    assert longer.degrees == {**TURNED.degrees, TIME: 4} and longer.names == TURNED.names
    assert longer.resized(TIME, 1) == TURNED


def test_meshes_in_another_order_are_other_meshes() -> None:
    assert USUAL != TURNED and hash(USUAL) != hash(TURNED)
    assert [USUAL.group(0, ("ring",)), TURNED.group(0, ("ring",))] == [(0, 3), (0, 1)]
    for mesh, order in ((USUAL, ("ring", "ulysses")), (TURNED, ("ulysses", "ring"))):
        divided = Layout((mesh.divide(6, SEQUENCE),))
        assert kind(mesh, divided, Layout.whole(1)) == ("gather", order)
        assert plan(mesh, (6,), divided, Layout.whole(1)).mesh_dims == order
        assert dimension_text(mesh, 6, divided.dims[0]) == f"6/({'*'.join(order)})"


def test_as_text() -> None:
    assert [mesh_text(mesh) for mesh in (Mesh(), USUAL, TURNED)] == ["1 rank", "ring=2 ulysses=3", "ulysses=3 ring=2"]
    assert mesh_text(Mesh(("expert",), (2,))) == "expert=2"
    assert mesh_text(Mesh(("pipefusion", "cfg"), (1, 2))) == "pipefusion=1 ring=1 ulysses=1 tensor=1 cfg=2"


@pytest.mark.parametrize(
    ("names", "sizes", "said"),
    [
        (("ring", "cfg", "ring"), (2, 1, 2), "ring, cfg, ring name ring twice; each may stand there once"),
        (("ring",), (0,), "ring=0 is not a positive integer; the nearest legal one is ring=1"),
        (("ring",), ("2",), "ring='2' is not a positive integer; the nearest legal one is ring=2"),
        (("ring",), (3.0,), "the nearest legal one is ring=3"),
        (("ring",), (True,), "ring=True is not a positive integer"),
        (("ring",), (2, 3), "a size for each of its dims; got the dims ('ring',) and the sizes (2, 3)"),
        (("2 d",), (2,), "'2 d' is no name of a mesh dim; legal are letters, digits and _"),
    ],
)
def test_what_is_no_mesh(names: tuple[str, ...], sizes: tuple[int, ...], said: str) -> None:
    with pytest.raises(ParallelizeError, match=re.escape(said)):
        Mesh(names, sizes)


def test_dims_that_a_mesh_does_not_have() -> None:
    for ask in (lambda: USUAL.size(("rings",)), lambda: USUAL.group(0, ("rings",)), lambda: USUAL.resized("rings", 2)):
        with pytest.raises(ParallelizeError, match="no dim 'rings'; it has cfg, pipefusion, ring, ulysses"):
            ask()
    with pytest.raises(IndexError, match="ring=2, but the mesh has ring=2"):
        USUAL.rank_at({"ring": 2})


def runs(size: int, *parts: tuple[int, int]) -> Partition:
    return Partition(size, tuple(Indices.range(*part) for part in parts))


@pytest.mark.parametrize(
    ("held", "once"),
    [
        (runs(9, (0, 5), (4, 9), (0, 0)), runs(9, (0, 4), (4, 9), (0, 0))),
        (runs(9, (0, 5), (1, 8), (4, 9)), runs(9, (0, 3), (3, 6), (6, 9))),
        (runs(9, (0, 3), (3, 6), (6, 9)), runs(9, (0, 3), (3, 6), (6, 9))),
        (runs(9, (0, 9), (3, 6), (6, 9)), None),
        (runs(9, (0, 3), (4, 6), (6, 9)), None),
    ],
    ids=["one overlap", "far", "none", "within another", "a gap"],
)
def test_runs_that_overlap_are_cut_in_the_middle(held: Partition, once: Partition | None) -> None:
    assert Mesh.of(ulysses=3).apart(held) == once
