"""What every rank computes whole in a trial: where it could be divided again, behind a value that had to be whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import fx

from xdit_ir.ir.program import SPEC
from xdit_ir.rules.base import as_layouts
from xdit_ir.sharding.assignment import Assignment
from xdit_ir.sharding.cost import step_flops
from xdit_ir.sharding.layout_graph import LayoutNode

# The part of a forward that is worth a look, and how many values are tried.
NOTABLE = 0.05
TRIED = 3


def undivided_values(tried: Assignment, total: int) -> list[fx.Node]:
    """Values of the outer graph from which much of what is not divided follows, first those from which most does; and
    those that the largest undivided steps take: what is in front of them may have to be whole again on the way."""
    work = {step: flops for step in tried.draft.steps if (flops := _whole_flops(tried, step))}
    if sum(work.values()) < NOTABLE * total:
        return []
    behind = _behind(tried.draft.steps, work)
    found = [*_most(work, behind, NOTABLE * total), *_most(work, work, NOTABLE * total)]
    return list(dict.fromkeys(found))


def _most(steps: Iterable[LayoutNode], flops: Mapping[LayoutNode, int], least: float) -> list[fx.Node]:
    """Values that these steps take, first those of the steps with most FLOPs."""
    first: dict[fx.Node, int] = {}
    for step in steps:
        for source in _streams(step):
            first[source] = max(first.get(source, 0), flops[step])
    ranked = sorted(first.items(), key=lambda item: -item[1])
    return [node for node, many in ranked if many >= least][:TRIED]


def _streams(step: LayoutNode) -> list[fx.Node]:
    """What of the operands may be divided: of an operator the first, of a block all, the largest first."""
    found = [source.node for source in (step.sources if step.body else step.sources[:1])]
    found = [node for node in found if node.op != "get_attr" and node.meta[SPEC].dtype.is_floating_point]
    return sorted(found, key=lambda node: -node.meta[SPEC].nbytes)


def _whole_flops(tried: Assignment, step: LayoutNode) -> int:
    """FLOPs of a step if every rank does all of them."""
    if not (step.body or step.is_operator) or not step.sources:
        return 0
    if not all(layout.is_whole for source in step.sources for layout in as_layouts(source.layout)):
        return 0
    if step.body:
        return max(tried.body(step).flops())
    sources = [(source.spec, source.layout) for source in step.sources]
    return max(step_flops(step.node, step.target, sources, (step.spec, step.layout), tried.draft.mesh), default=0)


def _behind(steps: list[LayoutNode], work: dict[LayoutNode, int]) -> dict[LayoutNode, int]:
    """Of every step the FLOPs of it and of the steps that follow from it, of those in `work`."""
    places = {step: place for place, step in enumerate(work)}
    reached: dict[LayoutNode, int] = {}  # sets of places, as bits
    for step in reversed(steps):
        own = 1 << places[step] if step in places else 0
        for user in step.users:
            own |= reached.get(user, 0)
        reached[step] = own
    flops = list(work.values())
    return {step: sum(one for place, one in enumerate(flops) if reached[step] >> place & 1) for step in work}
