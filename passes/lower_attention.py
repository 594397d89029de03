"""`lower-attention`: attention whose keys are divided becomes local, Ulysses, Ring, both, or gathers its keys."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import ClassVar

from xdit_ir.ir import ops
from xdit_ir.ir.facts import Fact
from xdit_ir.ir.layout import Layout, key_gather_dims
from xdit_ir.ir.mesh import FEATURES, RING, ULYSSES, Mesh
from xdit_ir.ir.partition import Partition
from xdit_ir.ir.program import Program
from xdit_ir.rules import infer
from xdit_ir.rules.attentions import parts_of_heads
from xdit_ir.rules.base import OpCall, OpSharding
from xdit_ir.sharding.machine import Machine
from xdit_ir.sharding.propagate import Propagation


@dataclass(frozen=True)
class LowerAttention:
    """Choose per attention, by layouts and cost, how its queries meet the keys of other ranks.

    Ulysses (arXiv 2309.14509): an all-to-all turns divided tokens into divided heads and back. Ring (arXiv
    2310.01889): keys and values travel, partial results are merged by their log-sum-exp. USP (arXiv 2405.07719) is
    both at once.
    """

    name: ClassVar[str] = "lower-attention"
    numerics: ClassVar[str] = "reassociated"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.LAYOUTS})
    provides: ClassVar[frozenset[Fact]] = frozenset({Fact.ATTENTION})

    mesh: Mesh
    machine: Machine = field(default_factory=Machine)

    def apply(self, program: Program) -> Program:
        """The program whose attentions each rank can compute with what the layouts give it."""
        return Propagation(program, self.mesh, self.infer).run().replace(mesh=self.mesh)

    def infer(self, call: OpCall) -> OpSharding:
        """The rules' decision, lowered where it is about an attention."""
        sharding = infer(call)
        return self._lower(call, sharding) if call.node.target is ops.attention else sharding

    def _lower(self, call: OpCall, sharding: OpSharding) -> OpSharding:
        q, k = sharding.inputs[:2]
        out = sharding.outputs
        assert isinstance(out, Layout)
        talk = call.dividing_dims(k.dims[-2])
        if call.arguments["is_causal"] and (talk or q.dims[-2] is not None):
            return self._causal(call, sharding)
        if not _has_square_mask(call):
            talk = key_gather_dims(call.mesh, q, k)
        heads = self._heads(call, q, k) if ULYSSES in talk else None
        k = k.with_dims({-2: _gathered(call, k, talk - {RING})})
        if heads is not None:
            dim, q_heads, k_heads = heads
            q = q.with_dims({dim: q_heads, -2: _gathered(call, q, {ULYSSES})})
            k = k.with_dims({dim: k_heads})
        ring = RING in talk
        return OpSharding(
            (q, k, k, *_masks(call, q, k)),
            q,
            target=ops.ring_attention if ring else None,
            result_layout=None if q == out else out,
        )

    def _heads(self, call: OpCall, q: Layout, k: Layout) -> tuple[int, Partition, Partition] | None:
        """The dim to divide for Ulysses and how, or None where gathering keys and values is better."""
        degree = self.mesh.size((ULYSSES,))
        for dim in range(len(call.out.shape) - 3, -1, -1):
            sizes = call.specs[0].shape[dim], call.specs[1].shape[dim]
            if call.dividing_dims(q.dims[dim]) & {*FEATURES}:
                found = self._refined(q.dims[dim], k.dims[dim], *sizes)
                return None if found is None else (dim, *found)
            free = q.dims[dim] is None and k.dims[dim] is None
            found = parts_of_heads(self.mesh, (ULYSSES,), *sizes) if free else None
            if found is not None:
                return (dim, *found) if self._worth(call, *sizes, degree) else None
        return None

    def _refined(
        self, q_heads: Partition | None, k_heads: Partition | None, queries: int, keys: int
    ) -> tuple[Partition, Partition] | None:
        """Heads that are divided as features already, divided further; None where some rank has too few for that."""
        group, degree = queries // keys, self.mesh.size((ULYSSES,))
        if q_heads is None or k_heads is None or k_heads.longer(group) != q_heads or min(k_heads.sizes) < degree:
            return None
        finer = self.mesh.refine(k_heads, (ULYSSES,))
        return finer.longer(group), finer

    def _worth(self, call: OpCall, queries: int, heads: int, degree: int) -> bool:
        """Whether Ulysses with possibly uneven heads beats whole heads over gathered keys, per rank."""
        q, k, v = (math.prod(spec.shape) * spec.dtype.itemsize for spec in call.specs[:3])
        flops = 4 * math.prod(call.specs[0].shape) * call.specs[1].shape[-2]
        count, away = heads if heads >= degree else queries, (degree - 1) / degree
        share = math.ceil(count / degree) / count
        exchange = (2 * q / degree + (k + v) / min(degree, heads)) * away
        gathering = (k + v) * away
        turned, whole = (
            self.machine.attention_seconds(work, call.specs[0].shape[-1], call.out.dtype)
            + self.machine.sending(self.mesh, (ULYSSES,), [sent] * self.mesh.world_size)
            for work, sent in ((flops * share, exchange), (flops / degree, gathering))
        )
        return turned <= whole

    def _causal(self, call: OpCall, sharding: OpSharding) -> OpSharding:
        """Causality needs keys in natural order: divide heads over every sequence mesh dim, or gather the keys and
        tell each rank the places of its queries."""
        out, q, k = sharding.outputs, sharding.inputs[0], sharding.inputs[1].with_dims({-2: None})
        assert isinstance(out, Layout)
        talk = call.dividing_dims(sharding.inputs[1].dims[-2]) | call.dividing_dims(q.dims[-2])
        size = call.specs[1].shape[-3] if len(call.out.shape) > 2 else 0
        if size == call.out.shape[-3] and size >= self.mesh.size(talk) and q.dims[-3] is None:
            heads = self.mesh.divide(size, talk)
            q, k = q.with_dims({-3: heads, -2: None}), k.with_dims({-3: heads})
        return OpSharding((q, k, k, *_masks(call, q, k)), q, result_layout=None if q == out else out)


def _has_square_mask(call: OpCall) -> bool:
    """Whether a mask has both queries and keys, which one mesh dim cannot divide at once."""
    sizes = call.out.shape[-2], call.specs[1].shape[-2]
    return any(spec.shape[-2:] == sizes for spec in call.specs[3:])


def _gathered(call: OpCall, layout: Layout, dims: Collection[str]) -> Partition | None:
    partition = layout.dims[-2]
    return None if partition is None else call.mesh.gathered(partition, dims)


def _masks(call: OpCall, q: Layout, k: Layout) -> tuple[Layout, ...]:
    """Masks follow batch, heads and queries of `q`; their columns are all keys in the order in which these come."""
    keys = k.dims[-2]
    columns = None if keys is None else call.mesh.gathered(keys, (RING,))
    result = []
    for spec in call.specs[3:]:
        offset = len(q.dims) - len(spec.shape)
        wanted = (*q.dims[:-1], columns)
        full = (*call.out.shape[:-1], call.specs[1].shape[-2])
        dims = [wanted[d + offset] if size == full[d + offset] else None for d, size in enumerate(spec.shape)]
        result.append(Layout(tuple(dims)))
    return tuple(result)
