"""`shard-features`: divide heads and features, and with them weights, over the mesh dim `tensor`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from xdit_ir.ir import ops
from xdit_ir.ir.facts import Fact
from xdit_ir.ir.graphs import placeholders
from xdit_ir.ir.hoist import early_inputs
from xdit_ir.ir.mesh import FEATURES, Mesh
from xdit_ir.ir.program import LAYOUT, Program, TensorSpec, is_weight
from xdit_ir.passes.feature_cuts import Cut, FeatureCuts, gathers
from xdit_ir.passes.surroundings import surroundings
from xdit_ir.sharding.layout_graph import LayoutGraph, LayoutNode, Layouts
from xdit_ir.sharding.machine import Machine, program_work
from xdit_ir.sharding.propagate import Propagation, Seeds

# The part of a block's weights (and work) that must be saved for it to be worth to divide them once more; and that of
# all weights that a product around the blocks has, of which half is saved: so for other inputs it is no other one.
WORTH = 0.002
AROUND = "around the blocks"


@dataclass(frozen=True)
class _Choice:
    """Seeds in a graph and what it costs with them: bytes of the fullest rank, ticks of the slowest, seconds sent."""

    seeds: Seeds
    draft: LayoutGraph
    weights: int
    work: int
    seconds: float


@dataclass(frozen=True)
class ShardFeatures:
    """Divide what each block does to tokens: heads of its attentions, hidden features of its products, and so the
    weights that make them and sum them up, of which each rank needs its part only. (arXiv 1909.08053, for any block.)

    Cuts of heads and of summed features are tried one by one, and followed by the rules to weights on both sides, to
    fused projections, which are cut by parts, and to sums over ranks. The one that saves most weights and work for the
    seconds that it costs is kept, then the next one, as long as one saves anything. What a block is given and returns
    stays as it is; a block in which nothing can be cut is not divided, and the report says so. What stands around the
    blocks is divided in the same way, where it is a part of the model that is worth it.
    """

    name: ClassVar[str] = "shard-features"
    numerics: ClassVar[str] = "reassociated"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.LAYOUTS})
    invalidates: ClassVar[frozenset[Fact]] = frozenset({Fact.ATTENTION, Fact.RUNNABLE})

    mesh: Mesh
    machine: Machine = field(default_factory=Machine)

    def apply(self, program: Program) -> Program:
        """The program whose ranks work on their heads and features."""
        if self.mesh.size(FEATURES) == 1:
            return program
        cuts, early = FeatureCuts(program, self.mesh), early_inputs(program)
        around = {block.name: block for block in surroundings(program, AROUND)}
        run, chosen = Propagation(program.replace(blocks={**program.blocks, **around}), self.mesh), dict[str, Seeds]()
        for name, block in program.blocks.items():
            first, whole = cuts.first(block.graph, early.get(name, set())), self._tried(run, name, {})
            chosen[name] = self._best(run, name, cuts, first, whole).seeds
        weights = sum(spec.nbytes for spec in program.state.values())
        everything = _Choice({}, LayoutGraph(self.mesh), weights, program_work(program, self.machine), 0.0)
        outside = dict[str, Layouts]()
        for name, block in around.items():
            first = cuts.first(block.graph, set(), WORTH * weights)
            outside |= self._best(run, name, cuts, first, everything, WORTH / 2).seeds
        return Propagation(program, self.mesh, inside=chosen).run(outside).replace(mesh=self.mesh)

    def _best(
        self, run: Propagation, name: str, cuts: FeatureCuts, first: Iterable[Cut], whole: _Choice, least: float = WORTH
    ) -> _Choice:
        """Greedy: what is worth most for what it costs comes first. A cut is seldom worth more behind others, so only
        the best is tried anew, until it stays the best; and every one before the search ends. What is saved counts as
        a part of the `whole`, and must be more than the `least`."""
        best, worth = self._tried(run, name, {}), dict.fromkeys(first, math.inf)
        tried: dict[Cut, _Choice] = {}
        while worth:
            cut = max(worth, key=lambda one: (worth[one] > 0 and not gathers(one), worth[one], one not in tried))
            if cut not in tried:
                tried[cut] = one = self._tried(run, name, {**best.seeds, **dict(cut)})
                gain = self._gain(one, best, whole)
                worth[cut] = gain / self._cost(one, best) if gain > least else 0.0
            elif worth[cut]:
                best, tried = tried[cut], {}
                known = worth | {one: math.inf for one in cuts.stuck(best.draft) if one not in worth}
                worth = {one: value for one, value in known.items() if best.seeds.keys().isdisjoint(dict(one))}
            else:
                break
        return best

    def _tried(self, run: Propagation, name: str, seeds: Seeds) -> _Choice:
        layouts = tuple(given.meta[LAYOUT] for given in placeholders(run.program.blocks[name].graph))
        draft = run.drafted(name, layouts, None, seeds)
        seconds = self.machine.exchange_seconds(self.mesh, draft.traffic())
        weights = sum(self._held(step) for step in draft.steps if is_weight(step.node) and not step.relayout)
        return _Choice(seeds, draft, weights, max(draft.work(self.machine)), seconds)

    def _held(self, weight: LayoutNode) -> int:
        """Bytes of a weight that the fullest rank needs."""
        layout = weight.common_shard() or weight.layout
        spec: TensorSpec = weight.spec
        return max(spec.on(layout, rank).nbytes for rank in range(self.mesh.world_size))

    def _gain(self, one: _Choice, before: _Choice, whole: _Choice) -> float:
        """The parts of a block's weights and work that are saved; nothing where either gets more, or weights not less:
        such a cut is not one of features. Nor is one of a weight that is brought together again."""
        if one.weights >= before.weights or one.work > before.work or _gathers_weights(one.draft):
            return 0.0
        work = (before.work - one.work) / max(whole.work, 1)
        return (before.weights - one.weights) / max(whole.weights, 1) + work

    def _cost(self, one: _Choice, before: _Choice) -> float:
        return max(one.seconds - before.seconds, self.machine.latency / 8)


def _gathers_weights(draft: LayoutGraph) -> bool:
    """Whether a part of a weight is brought together for some user."""
    return any(
        step.relayout and step.target is not ops.shard and is_weight(step.node) and step.sources[0].relayout
        for step in draft.steps
    )
