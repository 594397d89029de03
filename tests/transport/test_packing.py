"""What several values' pieces become as messages, and again as results, on all ranks in one process."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from divided import MESHES, local, partitions
from hypothesis import given, settings
from hypothesis import strategies as st

from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.relayout import plan
from xdit_ir.transport.direct import DirectReceive
from xdit_ir.transport.packing import Packing, chunk_messages, coming_sizes, message_of, results_of_messages

KINDS = ("whole", "even", "even", "any")


def exchanged(packings: Sequence[Packing], xs: Sequence[Sequence[torch.Tensor]]) -> list[list[torch.Tensor]]:
    """The results of all members, which give `xs`."""
    sent, own = [], []
    for packing, given_here in zip(packings, xs, strict=True):
        flat, sizes, kept = message_of(given_here, packing.takes, packing.leaving, packing.at, packing.direct)
        if packing.chunked:
            table = chunk_messages(given_here, packing.leaving[0], len(packings))
            assert torch.equal(table.view(-1), flat), "one copy or several, the messages are the same"
        sent.append(torch.split(flat, sizes))
        own.append(kept)
    results = []
    for at, packing in enumerate(packings):
        assert coming_sizes(packing.shapes) == [messages[at].numel() for messages in sent]
        flat = torch.cat([messages[at] for messages in sent])
        prepared = DirectReceive(packing, one=False)((flat, flat, own[at], None))
        given = packing.shapes, packing.assemblies, packing.coming, at, packing.direct
        results.append(results_of_messages(flat, own[at], *given))
        assert all(map(torch.equal, prepared, results[-1])) and len(prepared) == len(results[-1])
    return results


@settings(max_examples=60)
@given(st.data(), st.sampled_from(MESHES), st.tuples(st.integers(1, 2), *[st.integers(1, 5)] * 2), st.integers(1, 3))
def test_several_values_travel_as_if_each_did_alone(
    data: st.DataObject, mesh: Mesh, shape: tuple[int, int, int], values: int
) -> None:
    dims = data.draw(st.tuples(*[st.integers(0, 2)] * 2))
    source = Layout.whole(3).with_dims({dims[0]: data.draw(partitions(mesh, shape[dims[0]], KINDS))})
    target = Layout.whole(3).with_dims({dims[1]: data.draw(partitions(mesh, shape[dims[1]], KINDS))})
    widths = [data.draw(st.integers(1, 3)) for _ in range(values)]
    shapes = [(*shape, width) for width in widths]
    have, want = (Layout((*layout.dims, None)) for layout in (source, target))
    steps = [plan(mesh, one, have, want) for one in shapes]
    xs = [torch.arange(math.prod(one)).reshape(one) for one in shapes]
    group = steps[0].ranks[0].group  # some of the ranks, or all
    packings = [Packing.of([step.ranks[rank] for step in steps], at) for at, rank in enumerate(group)]
    found = exchanged(packings, [[local(x, have, rank) for x in xs] for rank in group])
    for rank, results in zip(group, found, strict=True):
        for x, result in zip(xs, results, strict=True):
            assert torch.equal(result, local(x, want, rank))


@pytest.mark.parametrize(("heads", "ranks"), [(4, 2), (4, 3), (2, 3)])
def test_heads_for_tokens_need_no_copy_where_they_arrive(heads: int, ranks: int) -> None:
    mesh = Mesh.of(ulysses=ranks)
    shape = (1, 7, heads, 2)
    tokens, parts = mesh.divide(7, ("ulysses",)), mesh.divide(heads, ("ulysses",))
    have, want = Layout((None, tokens, None, None)), Layout((None, None, parts, None))
    step = plan(mesh, shape, have, want)
    packings = [Packing.of([step.ranks[rank]] * 3, rank) for rank in range(ranks)]
    assert all(packing.direct for packing in packings if math.prod(step.ranks[packing.at].shape))
    assert all(packing.chunked == (heads % ranks == 0) for packing in packings)
    x = torch.arange(math.prod(shape)).reshape(shape)
    for rank, results in enumerate(
        exchanged(packings, [[local(x + i, have, rank) for i in range(3)] for rank in range(ranks)])
    ):
        for i, result in enumerate(results):
            assert torch.equal(result, local(x + i, want, rank))
        if packings[rank].direct:
            assert len({result.untyped_storage().data_ptr() for result in results}) == 1
