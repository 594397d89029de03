"""Text by hand: what layouts mean, what may be left out, and what is said about mistakes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xdit_ir.errors import ParseError
from xdit_ir.ir import ops
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.partition import Indices, Partition
from xdit_ir.ir.program import LAYOUT, SPEC, WHERE, TensorSpec, Where
from xdit_ir.sharding.verify import verify
from xdit_ir.text import parse, write
from xdit_ir.text.attachments import Collected
from xdit_ir.text.literals import LiteralWriter, read_literal
from xdit_ir.text.scanner import Scanner
from xdit_ir.text.types import TypeReader, TypeWriter, obvious, partition_text, read_partition

SMALL = """
program Small on ulysses=2 {
  input %x: f32[1, 8, 4]
  %cut: f32[1, 8/ulysses, 4] = shard(%x)
  // a comment
  %y = Layer<layers.0>(%cut) at layers.0 'model.py:1: x = layer(x)'
  %out: f32[1, 8/ulysses, 4] = %y[0]
  %whole: f32[1, 8, 4] = gather(%out)
  return %whole
}

block Layer(%x: f32[1, 8/ulysses, 4]) {
  %linear: f32[1, 8/ulysses, 4] = linear(%x, @proj.weight, @proj.bias)
  %add: f32[1, 8/ulysses, 4] = add.Tensor(%linear, %linear, alpha=2)
  return %add
}

weights {
  layers.0.proj.weight: f32[4, 4]
  layers.0.proj.bias: f32[4]
}
"""


def small(change: str = "", to: str = "") -> str:
    assert not change or change in SMALL
    return SMALL.replace(change, to, 1)


def test_a_program_by_hand_verifies() -> None:
    program = parse(small())
    verify(program, runnable=True)
    nodes = {node.name: node for node in program.graph.nodes}
    assert nodes["cut"].target is ops.shard
    assert nodes["cut"].meta[SPEC] == TensorSpec((1, 8, 4), torch.float32)
    assert nodes["cut"].meta[LAYOUT].dims[1] == Mesh.of(ulysses=2).divide(8, ("ulysses",))
    assert nodes["y"].meta[WHERE] == Where("layers.0", "model.py:1: x = layer(x)")
    assert write(parse(write(program).text)).text == write(program).text


@pytest.mark.parametrize(
    ("change", "to", "said"),
    [
        ("add.Tensor(", "ad.Tensor(", "no operator 'ad.Tensor'; nearest: "),
        ("add.Tensor(", "add.Tensors(", "add has no overload 'Tensors'"),
        (
            "gather(%out)",
            "gather(%ou)",
            "line 8, column 34: expected a value that stands before this line, got 'ou)'; nearest: out",
        ),
        ("f32[1, 8/ulysses, 4] = shard", "f23[1, 8/ulysses, 4] = shard", "expected a dtype, got 'f23[1, 8/ulysses, 4]"),
        ("8/ulysses, 4] = shard", "8~reordered, 4] = shard", "says no exact partition"),
        ("8/ulysses, 4] = shard", "8/ulysses#7, 4] = shard", "partition #7 is not listed"),
        ("@proj.weight", "@proj.weigth", "@proj.weigth is no weight or constant"),
        ("Layer<layers.0>", "Later<layers.0>", "there is no block Later; there are Layer"),
        ("  return %whole\n", "", "expected a graph that ends with `return`"),
        ("on ulysses=2", "on ulises=2", "8/ulysses says no exact partition on ulises=2"),
        ("on ulysses=2 ", "", "the program is on no mesh"),
        ("weights {", "weigths {", "'weigths' begins no section; nearest: weights"),
        ("%out: f32", "%cut: f32", "there is a value %cut already"),
        ("%whole: f32", "%out: f32", "there is a value %out already"),
        ("gather(%out)", "gather(%out) twice", "expected the end of the line, got 'twice'"),
        ("gather(%out)", "gather($sha256:00)", "refers to sha256:00, which is not among its 0 attachments"),
    ],
)
def test_mistakes_are_explained(change: str, to: str, said: str) -> None:
    with pytest.raises(ParseError, match="line") as failed:
        parse(small(change, to))
    assert said in str(failed.value)


def test_another_tensor_under_the_same_hash_is_refused() -> None:
    program = parse(small()).replace(constants={"big": torch.arange(1000)})
    document = write(program)
    [key] = document.attachments
    with pytest.raises(ParseError, match="has other contents"):
        parse(document.text, {key: torch.arange(1000) + 1})


literals = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False, allow_infinity=False)
    | st.text()
    | st.sampled_from([torch.float32, torch.uint8, torch.device("cpu"), torch.device("cuda:1"), torch.strided, ...]),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(literals)
@settings(max_examples=80, deadline=None)
def test_literals(value: object) -> None:
    text = LiteralWriter(Collected())(value)
    scanner = Scanner(text)
    again = read_literal(scanner, {}, lambda inner: inner.fail("no nodes"))
    scanner.end()
    assert again == value and repr(again) == repr(value)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64]
)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 2), (9, 9)])
def test_tensors_bit_by_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.randn(math.prod(shape), generator=torch.Generator().manual_seed(0)) * 3).to(dtype).reshape(shape)
    collected = Collected()
    again = read_literal(
        Scanner(LiteralWriter(collected)(tensor)), collected.found, lambda inner: inner.fail("no nodes")
    )
    assert again.dtype == dtype and torch.equal(again, tensor)


MESH = Mesh.of(cfg=2, ring=2, ulysses=2)


@given(st.lists(st.integers(0, 3), min_size=4, max_size=4), st.permutations(range(12)), st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_partition(cuts: list[int], order: list[int], in_order: bool) -> None:
    """Random parts over ring and ulysses; whatever has no obvious notation is numbered and listed."""
    places = sorted(order) if in_order else list(order)
    bounds = [0, *sorted(min(12, c * 4) for c in cuts[:3]), 12]
    parts = [Indices.of_runs((i, 1) for i in places[a:b]) for a, b in itertools.pairwise(bounds)]
    partition = Partition(12, tuple(parts[MESH.index(rank, ("ring", "ulysses"))] for rank in range(8)))
    writer = TypeWriter(MESH)
    text = writer._dimension(partition)
    listed = {number: read_partition(Scanner(partition_text(p))) for p, number in writer.numbers.items()}
    (spec, layout) = TypeReader(MESH, listed)(Scanner(f"f32[{text}]"))
    assert spec.shape == (12,)
    assert layout.dims[0] == (None if partition.is_whole else partition)
    assert ("#" in text) == (obvious(text.partition("#")[0], MESH) != partition)
