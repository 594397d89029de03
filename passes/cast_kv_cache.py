"""`cast-kv-cache`: stale keys and values in fewer bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from xdit_ir.errors import ParallelizeError
from xdit_ir.ir import ops
from xdit_ir.ir.facts import Fact
from xdit_ir.ir.graphs import map_graphs, operands
from xdit_ir.ir.mesh import TIME, Mesh
from xdit_ir.ir.program import BYTES_IN_FULL, LAYOUT, SPEC, Program
from xdit_ir.passes.emit import Emitter, aten
from xdit_ir.sharding.buffer_access import over_time

KV_CACHE_DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "fp8_e4m3": torch.float8_e4m3fn}
Stored = tuple[fx.Node, fx.Node | None]


@dataclass(frozen=True)
class CastKVCache:
    """Keep the keys and values that patches leave for each other as `dtype` (a name of `KV_CACHE_DTYPES`) where that is
    fewer bits: fp8 numbers with a scale for each token and head, its largest magnitude over that of fp8. All else that
    outlives a step (sums, halos, results) stays as it is.
    """

    name: ClassVar[str] = "cast-kv-cache"
    numerics: ClassVar[str] = "rounded"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.RUNNABLE})

    mesh: Mesh
    dtype: str = "auto"

    def apply(self, program: Program) -> Program:
        """The program in which such values are cast before they are exchanged over patches, and back behind that."""
        dtype = kv_cache_dtype(self.dtype)
        if dtype is None or self.mesh.size((TIME,)) == 1:
            return program
        return map_graphs(program, lambda graph: self._cast(graph, dtype))

    def _cast(self, graph: fx.Graph, dtype: torch.dtype) -> None:
        known: dict[fx.Node, Stored] = {}
        for node in list(graph.nodes):
            if not over_time(node, self.mesh) or not _is_keys(node):
                continue
            spec = node.meta[SPEC]
            if not spec.dtype.is_floating_point or spec.dtype.itemsize <= dtype.itemsize:
                continue
            [source] = operands(node)
            emitter = Emitter(graph, node, self.mesh)
            if source not in known:
                known[source] = _stored(emitter, source, dtype)
            node.replace_all_uses_with(_restored(emitter, node, known[source]))
            graph.erase_node(node)


def kv_cache_dtype(name: str) -> torch.dtype | None:
    """The dtype that the option means, None for that of the model; raises `ParallelizeError` for no such one."""
    if not isinstance(name, str) or name not in KV_CACHE_DTYPES:
        raise ParallelizeError(f"kv_cache_dtype={name!r}: expected one of {', '.join(KV_CACHE_DTYPES)}; nearest: auto")
    return KV_CACHE_DTYPES[name]


def _is_keys(node: fx.Node) -> bool:
    """Whether a value is taken as keys or values of attention, and by nothing else."""
    exchanged = node.target not in (*ops.SUMS, ops.halo_exchange)
    return (
        exchanged
        and bool(node.users)
        and all(
            user.target in ops.ATTENTIONS and node not in (user.args[0], *user.args[3:], *user.kwargs.values())
            for user in node.users
        )
    )


def _stored(emitter: Emitter, source: fx.Node, dtype: torch.dtype) -> Stored:
    """A value as it waits, and for fp8 its scales, `[..., tokens, 1]` in the value's dtype."""
    full, scale, values = source.meta[SPEC].dtype, None, source
    if dtype.itemsize == 1:
        largest = emitter.emit(aten.amax.default, emitter.emit(aten.abs.default, source), [-1], True)
        scale = emitter.emit(aten.mul.Tensor, largest, 1 / torch.finfo(dtype).max)
        # rows of zeros stay zeros
        scale = emitter.emit(aten.clamp_min.default, scale, torch.finfo(full).tiny, name=f"{source.name}_scale")
        scale.meta[BYTES_IN_FULL] = 0
        values = emitter.emit(aten.div.Tensor, source, scale)
    cast = emitter.emit(aten._to_copy.default, values, dtype=dtype, name=f"{source.name}_cast")
    cast.meta[BYTES_IN_FULL] = full.itemsize
    return cast, scale


def _restored(emitter: Emitter, node: fx.Node, stored: Stored) -> fx.Node:
    """What all patches have left, in the dtype and layout that `node` has."""
    (cast, scale), wanted = stored, node.meta[LAYOUT]
    result = emitter.cast(emitter.relayout(cast, wanted), node.meta[SPEC].dtype)
    if scale is None:
        return result
    rows = emitter.relayout(scale, wanted.with_dims({len(wanted.dims) - 1: None}))
    return emitter.emit(aten.mul.Tensor, result, rows)
