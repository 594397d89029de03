"""Rectangular copies between dense buffers do what packing, sending and unpacking do."""

from __future__ import annotations

import numpy as np
import torch
from divided import MESHES, local, partitions
from hypothesis import given
from hypothesis import strategies as st

from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.relayout import plan
from xdit_ir.transport.copies import copies


def as_bytes(x: torch.Tensor) -> np.ndarray:
    return x.numpy().view(np.uint8).reshape(-1)


@given(st.data(), st.sampled_from(MESHES), st.tuples(*[st.integers(1, 5)] * 3))
def test_copies_are_the_exchange(data: st.DataObject, mesh: Mesh, shape: tuple[int, int, int]) -> None:
    dims = data.draw(st.tuples(*[st.integers(0, 2)] * 2))
    source = Layout.whole(3).with_dims({dims[0]: data.draw(partitions(mesh, shape[dims[0]]))})
    target = Layout.whole(3).with_dims({dims[1]: data.draw(partitions(mesh, shape[dims[1]]))})
    value = torch.arange(int(np.prod(shape)), dtype=torch.int16).reshape(shape)
    steps = plan(mesh, shape, source, target)
    results = [np.full(2 * int(np.prod(x.shape)), 255, np.uint8) for x in steps.ranks]
    for rank, exchange in enumerate(steps.ranks):
        held = as_bytes(local(value, source, rank).contiguous())
        for member, peer in enumerate(exchange.group):
            for copy in copies(exchange, member, 2):
                for row in range(copy.height):
                    here, there = copy.source + row * copy.source_pitch, copy.target + row * copy.target_pitch
                    results[peer][there : there + copy.width] = held[here : here + copy.width]
    for rank in range(mesh.world_size):
        assert np.array_equal(results[rank], as_bytes(local(value, target, rank).contiguous()))


def test_heads_for_tokens_is_one_copy_per_batch_entry() -> None:
    mesh = Mesh.of(ulysses=2)
    tokens, heads = mesh.divide(8, ("ulysses",)), mesh.divide(4, ("ulysses",))
    source, target = Layout((None, tokens, None, None)), Layout((None, None, heads, None))
    for have, want in ((source, target), (target, source)):
        exchange = plan(mesh, (2, 8, 4, 16), have, want).ranks[0]
        assert len(copies(exchange, 1, 2)) == 2
