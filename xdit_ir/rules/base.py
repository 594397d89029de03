"""What a rule is: how one operator acts on divided operands.

A rule's `forward` answers, for the layouts that the operands have: which layouts it needs them in, which layout the
results get, and what each rank runs. Its `demand` answers the other way round: for a layout wanted of the result,
the operands' layouts that give it (or None); the caller verifies that answer with `forward`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import fx

from xdit_ir.ir.graphs import bound_arguments, nodes_in, operands
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.partition import Partition
from xdit_ir.ir.program import LAYOUT, SPEC, TensorSpec

LocalCall = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
Localize = Callable[[int], LocalCall]
Outputs = Layout | tuple[Layout, ...]


@dataclass(frozen=True)
class OpCall:
    """One operator call as a rule sees it; `layouts` go with `operands(node)`."""

    node: fx.Node
    mesh: Mesh
    layouts: tuple[Layout, ...]

    @cached_property
    def specs(self) -> tuple[TensorSpec, ...]:
        """Global shapes and dtypes of the operands."""
        return tuple(node.meta[SPEC] for node in operands(self.node))

    @property
    def out(self) -> TensorSpec:
        """Global shape and dtype of the (first) result."""
        return self.results[0]

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """Arguments by their names in the operator's schema, defaults filled in."""
        return bound_arguments(self.node)

    @cached_property
    def results(self) -> tuple[TensorSpec, ...]:
        """Global shapes and dtypes of all results."""
        spec = self.node.meta[SPEC]
        return (spec,) if isinstance(spec, TensorSpec) else tuple(spec)

    @cached_property
    def slots(self) -> tuple[str, ...]:
        """For every operand the name of the argument that it is, or is an entry of."""
        schema = getattr(self.node.target, "_schema", None)
        if schema is None:
            names = list(inspect.signature(self.node.target).parameters)  # type: ignore[arg-type]
        else:
            names = [argument.name for argument in schema.arguments]
        given = [*zip(names, self.node.args, strict=False), *self.node.kwargs.items()]
        return tuple(name for name, value in given for _ in nodes_in(value))

    def dividing_dims(self, partition: Partition | None) -> frozenset[str]:
        """The mesh dims along which a partition differs."""
        return self.mesh.dividing_dims(partition)


@dataclass(frozen=True)
class OpSharding:
    """What a rule decides for one call. `local(rank)` is the rank's own call; None: the same arguments for all.

    `fallback` is the reason why operands must be gathered here because no rule applies, or empty. A lowering may
    also replace the operator by `target`, and convert its result to the layout `result_layout`.
    """

    inputs: tuple[Layout, ...]
    outputs: Outputs
    local: Localize | None = None
    fallback: str = ""
    target: Callable[..., Any] | None = None
    result_layout: Layout | None = None


Forward = Callable[[OpCall], OpSharding]
Demand = Callable[[OpCall, Any], "tuple[Layout, ...] | None"]


def no_demand(call: OpCall, wanted: Any) -> tuple[Layout, ...] | None:
    """For operators through which a wanted layout is not pushed."""
    return None


@dataclass(frozen=True)
class Rule:
    """The two directions of a rule."""

    forward: Forward
    demand: Demand = no_demand

    @staticmethod
    def by(pick: Callable[[OpCall], Rule]) -> Rule:
        """For each call the rule that `pick` gives for it."""
        return Rule(lambda call: pick(call).forward(call), lambda call, wanted: pick(call).demand(call, wanted))


def gather_all(call: OpCall, reason: str) -> OpSharding:
    """The rule of last resort: operands whole, results whole."""
    divided = any(not layout.is_whole for layout in call.layouts)
    outputs = [Layout.whole(len(spec.shape)) for spec in call.results]
    return OpSharding(whole(call.specs), as_outputs(call, outputs), fallback=reason if divided else "")


def whole(specs: Sequence[TensorSpec]) -> tuple[Layout, ...]:
    """Replicated layouts for these values."""
    return tuple(Layout.whole(len(spec.shape)) for spec in specs)


def as_outputs(call: OpCall, layouts: Sequence[Layout]) -> Outputs:
    """Layouts of the results in the form in which the operator returns them: one, or a tuple."""
    return layouts[0] if isinstance(call.node.meta[SPEC], TensorSpec) else tuple(layouts)


def as_layouts(outputs: Outputs) -> tuple[Layout, ...]:
    """The opposite of `as_outputs`."""
    return (outputs,) if isinstance(outputs, Layout) else outputs


def dividing_dims_of(node: fx.Node, mesh: Mesh) -> frozenset[str]:
    """The mesh dims along which ranks hold different parts (or summands) of a node's value or values."""
    return frozenset().union(*(layout.dividing_dims(mesh) for layout in as_layouts(node.meta.get(LAYOUT, ()))))


def dims_whole(call: OpCall, operand: int, dims: Sequence[int]) -> Layout:
    """The operand's layout without a pending sum and with these dims made whole."""
    return call.layouts[operand].summed().with_dims(dict.fromkeys(dims))


def without_overlaps(call: OpCall, layout: Layout, dims: Iterable[int]) -> Layout:
    """The layout with each index of these dims on one rank, for what must count it once: ranks drop what others have
    too, or the dim is whole."""
    divided = {dim: partition for dim in dims if (partition := layout.dims[dim]) is not None}
    return layout.with_dims({dim: call.mesh.apart(partition) for dim, partition in divided.items()})


def choose(mesh: Mesh, candidates: Iterator[tuple[int, Partition]]) -> dict[int, Partition]:
    """Pick a partition per label, the first candidate wins; no mesh dim may divide two labels."""
    chosen: dict[int, Partition] = {}
    used: set[str] = set()
    for label, partition in candidates:
        dims = mesh.dividing_dims(partition)
        if label not in chosen and not dims & used:
            chosen[label] = partition
            used |= dims
    return chosen


def by_size(call: OpCall) -> list[int]:
    """Operand positions, the largest value first."""
    return sorted(range(len(call.specs)), key=lambda i: -call.specs[i].nbytes)


def verified(rule: Rule) -> Rule:
    """The rule, with only those answers of `demand` that `forward` confirms."""

    def demand(call: OpCall, wanted: Any) -> tuple[Layout, ...] | None:
        needs = rule.demand(call, wanted)
        if needs is None:
            return None
        sharding = rule.forward(OpCall(call.node, call.mesh, needs))
        return needs if sharding.inputs == needs and sharding.outputs == wanted else None

    return Rule(rule.forward, demand)


def same_call(call: OpCall, **changes: Any) -> LocalCall:
    """The node's call with some arguments (by schema name) changed."""
    target: Any = call.node.target
    arguments = call.arguments | changes
    schema = getattr(target, "_schema", None)
    if schema is None:
        return target, (), arguments
    args = tuple(arguments[a.name] for a in schema.arguments if not a.kwarg_only)
    named = ((a.name, arguments[a.name]) for a in schema.arguments if a.kwarg_only)
    return target, args, {name: value for name, value in named if value is not None}


def rules_of(rule: Rule, *packets: Any) -> Mapping[Any, Rule]:
    """Register one rule for several operators."""
    return dict.fromkeys(packets, rule)
