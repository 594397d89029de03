"""Rules of operators that users declare: `register_rule`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._library.custom_ops import CustomOpDef
from torch._ops import OpOverload, OpOverloadPacket

from xdit_ir.errors import ParallelizeError
from xdit_ir.ir.declared import Declaration, Sizes, declaration_of, declare
from xdit_ir.rules.base import Localize, OpCall, OpSharding, Rule, as_layouts, same_call
from xdit_ir.rules.labels import Labels, labelled

_ANONYMOUS = "_"


def register_rule(
    op: Any,
    rule: str,
    *,
    whole: str | Sequence[str] = (),
    sizes: Mapping[str, str] | None = None,
    sums: bool = False,
    flops: Callable[[Sizes], float] | None = None,
) -> None:
    """Declare how one of your own operators may be divided over ranks; without that its operands are gathered.

    `rule` names the dimensions of every tensor argument, in the order of the operator's schema, and of the results:
    `"b n d, d -> b n d"`. Dimensions of one name are divided alike, each rank calling the operator with its own part,
    in any order of indices. `...` stands for any number of dimensions in front, `_` for one that must be whole.

    Args:
        op: What `torch.library.custom_op` or `triton_op` made, or `torch.ops.namespace.name`.
        rule: See above.
        whole: Names along which the operator mixes, so that every rank needs all of them.
        sizes: Integer arguments that say how long a dimension is, by name: `{"length": "n"}`.
        sums: The operator is linear where a name is missing in the results, so that parts may be added up; otherwise
            such dimensions are whole.
        flops: The work, of the sizes by name, which decides how evenly it is shared: `lambda size: 2 * size["n"]`.

    Raises:
        ParallelizeError: the rule does not fit the operator, or PyTorch's own operator has a rule already.
    """
    packet = _packet(op)
    schema = getattr(packet, packet.overloads()[0])._schema  # type: ignore[no-untyped-call]
    tensors = [argument.name for argument in schema.arguments if "Tensor" in str(argument.type)]
    operands, results = _parsed(rule, schema)
    if (len(operands), len(results)) != (len(tensors), len(schema.returns)):
        raise ParallelizeError(
            f"register_rule({schema.name}): the rule {rule!r} is of {len(operands)} tensors and {len(results)} "
            f"results; the operator takes {len(tensors)} ({', '.join(tensors)}) and returns {len(schema.returns)}"
        )
    known = {name for dims in (*operands, *results) for name in dims}
    named = set(whole.split() if isinstance(whole, str) else whole)
    integers = {argument.name for argument in schema.arguments if str(argument.type) in ("int", "SymInt")}
    for what, given, legal in (
        ("whole", named, known),
        ("sizes, dimension", {*(sizes or {}).values()}, known),
        ("sizes, argument", {*(sizes or {})}, integers),
    ):
        if given - legal:
            raise ParallelizeError(
                f"register_rule({schema.name}), {what}: no {sorted(given - legal)[0]!r}; there are {sorted(legal)}"
            )
    by_name = dict(zip(tensors, operands, strict=True))
    made = Declaration(by_name, tuple(results), frozenset(named | {_ANONYMOUS}), dict(sizes or {}), sums, flops)
    declare(packet, made)


def _packet(op: Any) -> OpOverloadPacket[Any, Any]:
    found = op._opoverload if isinstance(op, CustomOpDef) else op
    packet = found.overloadpacket if isinstance(found, OpOverload) else found
    if not isinstance(packet, OpOverloadPacket):
        raise ParallelizeError(
            f"register_rule: {op!r} is no operator; give what torch.library.custom_op or triton_op made, or "
            "torch.ops.namespace.name"
        )
    if packet._qualified_op_name.startswith("aten::"):
        raise ParallelizeError(f"register_rule: {packet} is PyTorch's own operator, whose rule is not yours to declare")
    return packet


def _parsed(rule: str, schema: torch.FunctionSchema) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    sides = [[tuple(part.split()) for part in side.split(",")] for side in rule.split("->")]
    twice = any(dims.count(name) > 1 for side in sides for dims in side for name in dims if name != _ANONYMOUS)
    if len(sides) != 2 or twice:
        why = "it needs one arrow" if len(sides) != 2 else "a name stands twice in one tensor"
        raise ParallelizeError(
            f"register_rule({schema.name}): the rule {rule!r} is not like 'b n d, d -> b n d': {why}"
        )
    return sides[0], sides[1]


def declared_rule(target: Any) -> Rule | None:
    """The rule that users have declared for an operator."""
    return DECLARED if declaration_of(target) is not None else None


def _described(call: OpCall) -> Labels | str:
    declaration = declaration_of(call.node.target)
    assert declaration is not None
    dims = [declaration.operands[slot] for slot in call.slots]
    every = list(zip((*dims, *declaration.results), (*call.specs, *call.results), strict=True))
    named = [declaration.label(one, len(spec.shape)) for one, spec in every]
    for (one, spec), labels in zip(every, named, strict=True):
        if labels is None:
            return f"declared for dimensions {' '.join(one) or '(none)'}, given {len(spec.shape)}"
    results = [set(labels or ()) for labels in named[len(dims) :]]
    lasting = set.intersection(*results)
    found = [_free(labels or (), declaration, lasting) for labels in named]
    return Labels(tuple(found[: len(dims)]), tuple(found[len(dims) :]))


def _free(labels: tuple[Any, ...], declaration: Declaration, lasting: set[Any]) -> tuple[Any, ...]:
    """Labels along which an operator may be divided; None of the others."""
    return tuple(
        None if name in declaration.whole or not (name in lasting or declaration.sums) else name for name in labels
    )


def _local(call: OpCall, sharding: OpSharding) -> Localize | None:
    """Each rank is told how long its dims are."""
    declaration = declaration_of(call.node.target)
    assert declaration is not None
    if not declaration.sizes:
        return None
    dims = [*(declaration.operands[slot] for slot in call.slots), *declaration.results]
    layouts, specs = (*sharding.inputs, *as_layouts(sharding.outputs)), (*call.specs, *call.results)

    def sizes(rank: int) -> dict[str, int]:
        return {
            name: size
            for one, layout, spec in zip(dims, layouts, specs, strict=True)
            for name, size in zip(
                declaration.label(one, len(spec.shape)) or (), layout.local_shape(spec.shape, rank), strict=True
            )
        }

    return lambda rank: same_call(call, **{slot: sizes(rank)[name] for slot, name in declaration.sizes.items()})


def _picked(call: OpCall) -> Rule:
    declaration = declaration_of(call.node.target)
    return ADDED if declaration is not None and declaration.sums else LABELLED


LABELLED, ADDED = labelled(_described, _local), labelled(_described, _local, sums=True)
DECLARED = Rule.by(_picked)
