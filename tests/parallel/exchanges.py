"""Jobs that drive single communications."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import nn

from xdit_ir.ir.collective_ops import Reduce, ReduceScatter, Reshuffle, Ring
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import SEQUENCE, Mesh
from xdit_ir.ir.partition import Indices, Partition
from xdit_ir.ir.relayout import plan, scatter_plan
from xdit_ir.transport.collectives import lower
from xdit_ir.transport.distributed import Communicator

DTYPES = ("float32", "bfloat16", "float64", "complex64", "bool", "uint8", "int16", "int64", "float8_e4m3fn")
SHAPE = (5, 3, 7)


def partitions(mesh: Mesh, size: int) -> Iterator[Partition | None]:
    """Ways to divide a dimension: whole, even, all on one rank, interleaved, with a halo."""
    ranks = mesh.world_size
    yield None
    yield mesh.divide(size, ("ring", "ulysses"))
    yield Partition(size, tuple(Indices.range(0, size if rank == ranks - 1 else 0) for rank in range(ranks)))
    strided = [torch.arange(rank, size, ranks).numpy() for rank in range(ranks)]
    yield Partition(size, tuple(Indices.of_array(array) for array in strided))
    pieces = mesh.divide(size, ("ring", "ulysses")).parts
    yield Partition(
        size,
        tuple(Indices.range(max(0, min(p.array, default=0) - 1), max(p.array, default=-1) + 1) for p in pieces),
    )


def cut(x: torch.Tensor, layout: Layout, rank: int) -> torch.Tensor:
    """One rank's part of a value."""
    for dim, partition in enumerate(layout.dims):
        if partition is not None:
            x = x[(slice(None),) * dim + (torch.from_numpy(partition.parts[rank].array),)]
    return x


def value(dtype: str, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    """The same distinct numbers on every rank."""
    count = torch.Size(shape).numel()
    return torch.arange(count).remainder(127).reshape(shape).to(getattr(torch, dtype))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal shape, dtype and contents."""
    return a.dtype == b.dtype and a.shape == b.shape and bool((a.to(torch.complex64) == b.to(torch.complex64)).all())


def perform(modules: tuple[nn.Module, ...], x: torch.Tensor) -> torch.Tensor:
    """Start a communication and wait for it."""
    first, *rest = modules
    result = first(x)
    return rest[0](*result) if rest else result


def _degrees_to_mesh(degrees: dict[str, int]) -> tuple[Mesh, Communicator]:
    torch.set_num_threads(1)
    mesh = Mesh.of(**degrees)
    return mesh, Communicator(mesh, torch.device("cpu"), handshake=False)


def reshuffles(degrees: dict[str, int]) -> dict[str, int]:
    """Every change between layouts that divide one dimension; counts of kinds that were right and of wrong ones."""
    mesh, communicator = _degrees_to_mesh(degrees)
    layouts = [
        Layout.whole(len(SHAPE)).with_dims({dim: partition})
        for dim in (0, 2)
        for partition in partitions(mesh, SHAPE[dim])
    ]
    counts: dict[str, int] = {"wrong": 0}
    for case, (source, target) in enumerate(itertools.product(layouts, layouts)):
        steps = plan(mesh, SHAPE, source, target)
        if steps.kind == "shard":
            continue
        x = value(DTYPES[case % len(DTYPES)])
        group = mesh.group(communicator.rank, steps.mesh_dims)
        node = Reshuffle(steps.kind, steps.mesh_dims, group, steps.ranks[communicator.rank])
        communicator.prepare([steps.mesh_dims])
        got = perform(lower(node, communicator), cut(x, source, communicator.rank).contiguous())
        right = same(got, cut(x, target, communicator.rank))
        counts[steps.kind if right else "wrong"] = counts.get(steps.kind if right else "wrong", 0) + 1
    return counts


def reductions(degrees: dict[str, int]) -> list[bool]:
    """Sums over all ranks, per dtype; an empty tensor too."""
    mesh, communicator = _degrees_to_mesh(degrees)
    dims = ("ring", "ulysses")
    communicator.prepare([dims])
    (module,) = lower(Reduce("all_reduce", dims, mesh.group(communicator.rank, dims)), communicator)
    total = sum(range(1, mesh.world_size + 1))
    right = []
    for dtype in ("float32", "bfloat16", "complex64", "int64"):
        x = value(dtype).remainder(4) if dtype != "complex64" else value(dtype)
        right.append(same(module(x * (communicator.rank + 1)), x * total))
    right.append(module(torch.empty(0, 3)).shape == (0, 3))
    return right + _scattered(mesh, communicator)


def _scattered(mesh: Mesh, communicator: Communicator) -> list[bool]:
    """Sums of which every rank wants a part, however uneven."""
    pending = Layout((None,) * len(SHAPE), mesh.dividing_dims(mesh.divide(8, SEQUENCE)))
    x, right = value("float32").remainder(4), []
    for partition in list(partitions(mesh, SHAPE[0]))[1:4]:
        target = Layout.whole(len(SHAPE)).with_dims({0: partition})
        steps = scatter_plan(mesh, SHAPE, pending, target)
        group = mesh.group(communicator.rank, steps.mesh_dims)
        communicator.prepare([steps.mesh_dims])
        modules = lower(ReduceScatter(steps.kind, steps.mesh_dims, group, steps.ranks[communicator.rank]), communicator)
        total = x * sum(range(1, mesh.world_size + 1))
        right.append(same(perform(modules, x * (communicator.rank + 1)), cut(total, target, communicator.rank)))
    return right


def rings(degrees: dict[str, int]) -> list[float]:
    """Largest error of ring attention with uneven (also no) keys, with masks, grouped heads and other value sizes."""
    mesh, communicator = _degrees_to_mesh(degrees)
    dims = ("ring", "ulysses")
    communicator.prepare([dims])
    group, ranks, at = mesh.group(communicator.rank, dims), mesh.world_size, communicator.rank
    generator = torch.Generator().manual_seed(0)
    errors = []
    for keys, heads, width in (
        ((4,) * ranks, 2, 8),
        ((5, 0, 3, 2)[:ranks], 2, 8),
        ((0, 6, 0, 1)[:ranks], 1, 4),
    ):
        q = torch.randn(2, 2, 3, 8, generator=generator)
        k = torch.randn(2, heads, sum(keys), 8, generator=generator)
        v = torch.randn(2, heads, sum(keys), width, generator=generator)
        mask = torch.randn(2, 1, 3, sum(keys), generator=generator) > 0
        mask[..., -1] = True
        own = slice(sum(keys[:at]), sum(keys[: at + 1]))
        (module,) = lower(Ring("ring_attention", dims, group, tuple(keys)), communicator)
        for given in (None, mask):
            got = module(q, k[:, :, own], v[:, :, own], given, None, False, heads == 1)
            want = torch.nn.functional.scaled_dot_product_attention(q, k, v, given, enable_gqa=heads == 1)
            errors.append((got - want).abs().max().item())
    return errors


def order(degrees: dict[str, int]) -> dict[str, list[int]]:
    """The members of every group, as its collectives see them, against the mesh."""
    mesh, communicator = _degrees_to_mesh(degrees)
    found = {}
    for dims in (("ulysses",), ("ring",), ("ring", "ulysses"), ("cfg", "ulysses"), ("cfg",)):
        if mesh.size(dims) > 1:
            communicator.prepare([dims])
            members = mesh.group(communicator.rank, dims)
            ranks = torch.distributed.get_process_group_ranks(communicator.group(dims))
            found["x".join(dims)] = [*ranks, -1, *members]
    return found
