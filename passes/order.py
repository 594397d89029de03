"""The order of passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xdit_ir.caching.rule import Watched
from xdit_ir.ir.mesh import TIME, Mesh
from xdit_ir.passes.align_samples import AlignSamples
from xdit_ir.passes.canonicalize import Canonicalize
from xdit_ir.passes.cast_kv_cache import CastKVCache
from xdit_ir.passes.choose_kernels import ChooseKernels
from xdit_ir.passes.compose_attention import ComposeAttention
from xdit_ir.passes.contract import Pass
from xdit_ir.passes.cut_blocks import CutBlocks
from xdit_ir.passes.displace_patches import DisplacePatches
from xdit_ir.passes.divide_conditions import DivideConditions
from xdit_ir.passes.drop_casts import DropCasts
from xdit_ir.passes.find_tokens import FindTokens
from xdit_ir.passes.fuse_gelu import FuseGelu
from xdit_ir.passes.group_keys import GroupKeys
from xdit_ir.passes.keep_parts import KeepParts
from xdit_ir.passes.keeping import ALL_HERE, Keeping
from xdit_ir.passes.lower_attention import LowerAttention
from xdit_ir.passes.merge_halos import MergeHalos
from xdit_ir.passes.order_exchanges import OrderExchanges
from xdit_ir.passes.overlap import Overlap
from xdit_ir.passes.own_parts import OwnParts
from xdit_ir.passes.pace_pulls import PacePulls
from xdit_ir.passes.pack_exchanges import PackExchanges
from xdit_ir.passes.partition_stages import PartitionStages
from xdit_ir.passes.propagate_layouts import PropagateLayouts
from xdit_ir.passes.replicate_shared import ReplicateShared
from xdit_ir.passes.reuse_region import ReuseRegion
from xdit_ir.passes.scale_first import ScaleFirst
from xdit_ir.passes.select_on_device import SelectOnDevice
from xdit_ir.passes.separate_time import SeparateTime
from xdit_ir.passes.shard_features import ShardFeatures
from xdit_ir.passes.shard_tokens import ShardTokens
from xdit_ir.passes.shard_weights import ShardWeights
from xdit_ir.passes.share_branches import ShareBranches
from xdit_ir.passes.split_batch import Batch, SplitBatch
from xdit_ir.passes.split_joins import SplitJoins
from xdit_ir.passes.split_statistics import SplitStatistics
from xdit_ir.passes.take_known import TakeKnown
from xdit_ir.passes.tile_attention import TileAttention
from xdit_ir.passes.trim_padding import TrimPadding
from xdit_ir.passes.use_copy_engines import UseCopyEngines
from xdit_ir.passes.write_in_place import WriteInPlace
from xdit_ir.sharding.machine import H100, Machine
from xdit_ir.sharding.specialize import Specialize

# Every pass that can run between `trace` and the code of a rank, in that order. `displace-patches` stands in for
# `shard-tokens` under PipeFusion, which skips what is about exchanges.
PASSES: tuple[type[Any], ...] = (
    *(Canonicalize, TakeKnown, ComposeAttention, GroupKeys, TrimPadding, AlignSamples, FindTokens, ReuseRegion),
    *(PartitionStages, SplitBatch, ShareBranches, ShardTokens, ReplicateShared, DisplacePatches, PropagateLayouts),
    *(
        ShardFeatures,
        LowerAttention,
        TileAttention,
        SplitStatistics,
        MergeHalos,
        DivideConditions,
        OrderExchanges,
        SplitJoins,
        Overlap,
        KeepParts,
        SeparateTime,
        CastKVCache,
        ShardWeights,
    ),
    *(Specialize, PackExchanges, SelectOnDevice, CutBlocks, ScaleFirst, DropCasts),
    *(WriteInPlace, FuseGelu, ChooseKernels, UseCopyEngines, OwnParts, PacePulls),
)


def analysis_passes(rows: int = 0) -> list[Pass]:
    """Passes that do not depend on the mesh; see `canonical_passes` for `rows`."""
    return [*canonical_passes(rows), FindTokens()]


def canonical_passes(rows: int = 0) -> list[Pass]:
    """Those of them after which each thing has one form; padding is trimmed to multiples of so many rows, if any."""
    trim: list[Pass] = [TrimPadding(rows)] if rows else []
    return [Canonicalize(), TakeKnown(), ComposeAttention(), GroupKeys(), *trim]


def cache_passes(watched: Watched) -> list[Pass]:
    """Passes for a step cache, behind those of the analysis."""
    return [ReuseRegion(watched.value)]


def token_passes(mesh: Mesh, machine: Machine = H100) -> list[Pass]:
    """Passes that divide the token streams, in place or over patches in time, and write layouts."""
    if mesh.size((TIME,)) > 1:
        return [DisplacePatches(mesh, machine), PropagateLayouts()]
    return [ShardTokens(mesh, machine), ReplicateShared(machine), PropagateLayouts()]


def _split(mesh: Mesh, batch: Batch, machine: Machine) -> list[Pass]:
    return [] if batch is Batch.CALLS else [SplitBatch(mesh, batch is Batch.SHARED, machine)]


def weight_passes(
    mesh: Mesh, machine: Machine, batch: Batch, keeping: Keeping, before: frozenset[str] = frozenset()
) -> list[Pass]:
    """Passes for weights that are not all on every rank's GPU; `before`: what earlier programs of the model store."""
    if keeping == ALL_HERE:
        return []
    paired, along = batch is Batch.CALLS, "+".join(keeping.along)
    return [ShardWeights(mesh, paired, keeping.stream, keeping.resident, machine, before, along)]


def mesh_passes(
    mesh: Mesh,
    machine: Machine = H100,
    *,
    batch: Batch = Batch.DIVIDED,
    keeping: Keeping = ALL_HERE,
    before: frozenset[str] = frozenset(),
) -> list[Pass]:
    """Passes that divide a program over a mesh; `rank_passes` follow, per rank. `before` as for `weight_passes`."""
    split = _split(mesh, batch, machine)
    return [
        *split,
        ShareBranches(mesh, machine),
        *token_passes(mesh, machine),
        ShardFeatures(mesh, machine),
        LowerAttention(mesh, machine),
        TileAttention(machine),
        SplitStatistics(),
        MergeHalos(machine),
        DivideConditions(mesh, machine, paired=batch is Batch.CALLS),
        OrderExchanges(),
        SplitJoins(),
        Overlap(mesh, machine),
        KeepParts(mesh, paired=batch is Batch.CALLS),
        *weight_passes(mesh, machine, batch, keeping, before),
    ]


def time_passes(
    mesh: Mesh,
    machine: Machine = H100,
    *,
    batch: Batch = Batch.DIVIDED,
    keeping: Keeping = ALL_HERE,
    before: frozenset[str] = frozenset(),
    kv_cache_dtype: str = "auto",
) -> list[Pass]:
    """Passes that divide a program with stages over a mesh whose dim `pipefusion` counts patches. `before` as for
    `weight_passes`."""
    return [
        *_split(mesh, batch, machine),
        *token_passes(mesh, machine),
        LowerAttention(mesh, machine),
        SplitStatistics(),
        SeparateTime(mesh),
        *([] if kv_cache_dtype == "auto" else [CastKVCache(mesh, kv_cache_dtype)]),
        *weight_passes(mesh, machine, batch, keeping, before),
    ]


def rank_passes(
    capability: tuple[int, int] | None,
    attention: str = "auto",
    *,
    compiled: bool = False,
    recorded: bool = False,
    packed: bool = False,
) -> list[Pass]:
    """Passes over the program of one rank, for the device that it runs on.

    Args:
        capability: the compute capability of the GPU; None: no GPU.
        attention: the kernel for attention, see `xdit_ir.emission.execution.Execution`.
        compiled: each block becomes the code of a compiler.
        recorded: the program becomes part of a CUDA graph.
        packed: exchanges that are ready at the same place become one.
    """
    apart: list[Pass] = [PackExchanges()] if packed else []
    apart += [SelectOnDevice(), CutBlocks()] if compiled or recorded else []
    if capability is None:
        return [*apart, WriteInPlace()]
    apart += [ScaleFirst()] if compiled else [DropCasts()]
    return [*apart, WriteInPlace(), FuseGelu(), ChooseKernels(capability, attention, recorded)]


def peer_passes(rank: int, agreed: Sequence[str] | None = None) -> list[Pass]:
    """Passes behind these over the program of a rank whose GPU reads and writes memory of the others' GPUs; `agreed`:
    the exchanges that all ranks can have by copy engines, see `candidates`; None: all that this rank can."""
    engines: list[Pass] = [UseCopyEngines("+".join(agreed or ()))] if agreed is None or agreed else []
    return [*engines, OwnParts(rank), PacePulls()]
