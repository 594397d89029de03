"""Which degrees there are for some GPUs, and roughly what each takes: from one GPU's estimate and the attentions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from xdit_ir.degrees import Degrees
from xdit_ir.errors import ParallelizeError
from xdit_ir.ir import ops
from xdit_ir.ir.graphs import all_graphs, operands
from xdit_ir.ir.mesh import BATCH, FEATURES, MESH_DIMS, RING, TIME, ULYSSES
from xdit_ir.ir.program import SPEC, Program
from xdit_ir.planning.estimate import Estimate
from xdit_ir.planning.hardware import GIB, Hardware

# A pipeline with as many patches as stages, and with twice as many.
PATCHES = (1, 2)
# How much of an exchange is hidden under other work, roughly, where copy engines do it.
HIDDEN = 0.6
# How much longer stages take than a fair share, roughly: they are uneven, and keep what other patches need.
STAGED = 1.15


def degree_sets(gpus: int, given: Mapping[str, int], *, exact: bool, features: bool = True) -> list[Degrees]:
    """All sets of degrees whose product is `gpus`, those that are `given` as they are; stages only if results need not
    be `exact`, or if they are given; `features`: these are divided also where that is not given.

    Raises:
        ParallelizeError: what is given does not divide `gpus`.
    """
    done = math.prod(given.values())
    if gpus % done:
        named = " x ".join(f"{name}={size}" for name, size in given.items())
        near = max(size for size in range(1, gpus + 1) if gpus % size == 0 and size <= done)
        raise ParallelizeError(f"{named} does not divide {gpus} GPUs; a product of {near} does")
    kept = {*given, *(() if features else FEATURES), *((TIME,) if exact else ())}
    free = [name for name in MESH_DIMS if name not in kept]
    found = []
    for sizes in _factors(gpus // done, len(free)):
        degrees = {**given, **dict(zip(free, sizes, strict=True))}
        stages = degrees.get(TIME, 1)
        found += [Degrees.of(patches=times * stages, **degrees) for times in PATCHES] if stages > 1 else []
        found += [Degrees.of(**degrees)] if stages == 1 else []
    return found


def _factors(number: int, count: int) -> Iterator[tuple[int, ...]]:
    """All ways to write a number as a product of so many."""
    if count == 0:
        yield from [()] if number == 1 else []
        return
    for size in range(1, number + 1):
        if number % size == 0:
            yield from ((size, *rest) for rest in _factors(number // size, count - 1))


@dataclass(frozen=True)
class Exchanged:
    """One self-attention on one GPU, `times` in a forward: heads, and bytes of queries, and of keys and values."""

    times: int
    heads: int
    queries: int
    keys: int


def attentions(program: Program) -> list[Exchanged]:
    """Those of an analysed program in which as many keys as queries meet."""
    found = []
    for _, graph, times in all_graphs(program):
        for node in graph.nodes:
            if node.target in ops.ATTENTIONS:
                q, k, v = (source.meta[SPEC] for source in operands(node)[:3])
                if k.shape[-2] >= q.shape[-2] and len(q.shape) > 2:
                    found.append(Exchanged(times, q.shape[-3], q.nbytes, k.nbytes + v.nbytes))
    return found


@dataclass(frozen=True)
class Rough:
    """What degrees take, as far as it follows from one GPU's estimate: to know which are worth working out."""

    alone: Estimate
    attentions: list[Exchanged]
    hardware: Hardware

    def ms(self, degrees: Degrees, *, shard_weights: bool = False) -> float:
        """Milliseconds of a step, roughly."""
        sizes, parts = degrees.mesh.degrees, self.alone.parts
        ranks, features = degrees.ranks, degrees.mesh.size(FEATURES)
        divided = sizes[ULYSSES] * features
        heads = min((one.heads for one in self.attentions), default=1)
        uneven = math.ceil(heads / divided) * divided / heads
        attention = parts.attention * uneven / ranks
        # of what is neither product nor attention, about half is done with features whole
        rest = parts.rest * (1 + features) / 2 / ranks
        started = (degrees.patches or 1) * self._started() if sizes[TIME] > 1 else self._started()
        moved = sum(self._exchange(one, degrees, attention) for one in self.attentions) * 1e3
        shared = parts.products / ranks + rest + attention
        taken = shared * (STAGED if sizes[TIME] > 1 else 1) + moved + started * (1 - 1 / ranks)
        return taken + (self._gathered(ranks, taken) if shard_weights else 0.0)

    def _started(self) -> float:
        """Milliseconds of all kernels' begins and ends, which no division shortens."""
        return self.hardware.kernels.gap * 1e3 * 8 * sum(one.times for one in self.attentions)

    def _gathered(self, ranks: int, work: float) -> float:
        """Milliseconds of gathering weights that so much work does not hide."""
        sent = self.alone.weights[0] * GIB * (ranks - 1) / ranks
        return max(self._seconds(sent, ranks, 1) * 1e3 - work, 0.0)

    def _exchange(self, one: Exchanged, degrees: Degrees, attention: float) -> float:
        """Seconds in which nothing hides the exchanges of an attention, all times together."""
        sizes, features = degrees.mesh.degrees, degrees.mesh.size(FEATURES)
        along, around = sizes[ULYSSES], sizes[RING]
        share = degrees.ranks // sizes[TIME]
        turned = (2 * one.queries + one.keys) / share * (along - 1) / along
        hidden = HIDDEN if self.hardware.link(range(0, along * features, features)).hidden else 0.0
        first = (1 - hidden) * self._seconds(turned, along, features, times=4)
        # two sums, each scattered and gathered
        summed = 2 * self._seconds(2 * one.queries * features / share * (features - 1) / features, features, 1)
        return one.times * (first + summed + self._passed(one, share, around, along * features, attention))

    def _passed(self, one: Exchanged, share: int, around: int, inner: int, attention: float) -> float:
        """Seconds by which an attention takes longer for keys that travel `around` so many ranks, or in tiles of them
        (two exchanges of queries and results, two of keys and values)."""
        if around == 1:
            return 0.0
        link = self.hardware.link(range(0, inner * around, inner))
        hop = link.seconds(one.keys / share)
        each = attention / 1e3 / max(sum(other.times for other in self.attentions), 1)
        joined = self.hardware.kernels.joining_seconds(one.queries / share)
        ring = max(hop * (around - 1) - each, 0.0) + (around - 1) * joined
        sent = ((rows - 1, around // rows - 1) for rows in range(2, around // 2 + 1) if around % rows == 0)
        tiles = (
            2 * link.seconds(a * one.queries / share) + 2 * link.seconds(b * one.keys / share / 2) for a, b in sent
        )
        return min([ring, *tiles])

    def _seconds(self, sent: float, ranks: int, apart: int, *, times: int = 1) -> float:
        """Of exchanges, `times` as many, in which each of so many ranks, so far apart, sends so many bytes in all."""
        if ranks == 1:
            return 0.0
        group = range(0, ranks * apart, apart)
        return self.hardware.seconds(0, group, sent) + (times - 1) * self.hardware.link(group).latency


def batch_degrees(sets: Sequence[Degrees]) -> list[int]:
    """The different degrees along the batch, but for 1."""
    return sorted({one.mesh.degrees[BATCH] for one in sets} - {1})
