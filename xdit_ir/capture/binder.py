"""Calls as inputs of a program, which is refused where it was not made for such calls."""

from __future__ import annotations

import inspect
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from xdit_ir.capture.inputs import bind_arguments, flatten_named, layout_of, sharing
from xdit_ir.capture.objects import Snapshot, snapshot
from xdit_ir.capture.outputs import attributes_of
from xdit_ir.capture.predicates import evaluate
from xdit_ir.capture.values import spec_of
from xdit_ir.errors import MismatchError
from xdit_ir.ir.guards import STATE, STRIDES, Guard, Predicate
from xdit_ir.ir.named_tensors import find_tensor
from xdit_ir.ir.program import Program, TensorSpec
from xdit_ir.ir.wrappers import PLAIN
from xdit_ir.reflection.atoms import ATOMS, alike

_REMEMBERED = 8  # tensors of each check


class Verdicts:
    """What was found of the contents of tensors, by what was checked, as long as nothing writes to them: of the last
    few, as the two halves of guidance come in turn."""

    def __init__(self) -> None:
        self._known: dict[str | int, deque[_Verdict]] = {}

    def of(self, check: str | int, tensors: Sequence[torch.Tensor], find: Callable[[], bool]) -> bool:
        """Whether these very tensors are right, found out where it is not known. It never is of inference tensors, and
        of those on the CPU, which are quickly compared and may be written to through NumPy or `.data`, uncounted.
        """
        known = self._known.setdefault(check, deque(maxlen=_REMEMBERED))
        for verdict in known:
            if verdict.is_of(tensors):
                return verdict.right
        right = find()
        known.append(_Verdict([(weakref.ref(tensor), _version(tensor)) for tensor in tensors], right))
        return right


@dataclass(frozen=True)
class _Verdict:
    """Whether tensors, as they were then, are `right`."""

    tensors: list[tuple[weakref.ref[torch.Tensor], int]]
    right: bool

    def is_of(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether these are the tensors, as they were."""
        return len(self.tensors) == len(tensors) and all(
            ref() is tensor and _version(tensor) == before >= 0 and tensor.device.type != "cpu"
            for (ref, before), tensor in zip(self.tensors, tensors, strict=True)
        )


def _version(tensor: torch.Tensor) -> int:
    """How often a tensor was written to; -1 where that is not counted."""
    return -1 if tensor.is_inference() else tensor._version


class BufferGuards:
    """Buffers of a model that were read in Python when a program was traced.

    Raises:
        MismatchError: by `check`, if one is not what it was, or is gone.
    """

    def __init__(self, model: nn.Module, program: Program) -> None:
        self._model, self._verdicts = model, Verdicts()
        self._guards = [guard for guard in program.signature.guards if guard.path.startswith(STATE)]

    def check(self) -> None:
        """See above."""
        for guard in self._guards:
            name = guard.path.removeprefix(STATE)
            buffer = find_tensor(self._model, name)
            if buffer.is_meta:  # released: nobody can write to it
                continue
            if not self._verdicts.of(name, [buffer], partial(_is_equal, buffer, guard)):
                raise MismatchError(f"{name}: it was read while tracing ({guard.reason}) and has changed")


class InputBinder:
    """Turns calls into values of a program's placeholders, if the program was made for such calls.

    Contents of guarded tensors are compared only when another tensor comes, or when it was written to since. `real`:
    there must be contents.
    """

    def __init__(self, forward: nn.Module | inspect.Signature, program: Program, *, real: bool = True) -> None:
        self._real = real
        self._signature = forward if isinstance(forward, inspect.Signature) else inspect.signature(forward.forward)
        self._expected = program.signature
        self._guards = {guard.path: guard for guard in program.signature.guards}
        self._verdicts = Verdicts()
        self._laid = any(path.startswith(STRIDES) for path in self._guards)
        self._writes = any(effect.write for effect in program.signature.effects)

    def __call__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """The tensors for the placeholders; raises `MismatchError` naming what differs."""
        named = bind_arguments(self._signature, args, kwargs, MismatchError)
        leaves, spec = flatten_named(named)
        if spec != self._expected.in_spec:
            raise MismatchError(f"inputs differ from those of the trace: {self._difference(leaves)}")
        tensors: list[torch.Tensor] = []
        for expected, (path, leaf) in zip(self._expected.leaves, leaves, strict=True):
            self._check_leaf(path, expected.spec, leaf)
            if isinstance(leaf, torch.Tensor):
                if self._real and leaf.is_meta:
                    raise MismatchError(f"{path} is on the meta device: it has no values")
                tensors.append(leaf)
        self._check_predicates(dict(leaves))
        if self._writes and (pair := sharing(leaves)):
            raise MismatchError(f"{' and '.join(pair)} share memory, and forward writes to what it is given")
        return tensors

    def _check_predicates(self, leaves: Mapping[str, Any]) -> None:
        """What was read of inputs must be as it was; waits for the device, but only if their contents may be new."""
        for index, fact in enumerate(self._expected.predicates):
            given = [leaves[path] for path in fact.paths]
            if not self._verdicts.of(index, given, partial(_holds, fact, leaves)):
                names = ", ".join(fact.paths)
                raise MismatchError(f"{names}: what was read of it while tracing ({fact.reason}) has changed")

    def _difference(self, leaves: list[tuple[str, Any]]) -> str:
        given, known = [path for path, _ in leaves], [leaf.path for leaf in self._expected.leaves]
        missing = [path for path in known if path not in given]
        surplus = [path for path in given if path not in known]
        parts = [f"missing {', '.join(missing)}"] if missing else []
        parts += [f"unexpected {', '.join(surplus)}"] if surplus else []
        if not parts and given != known:
            parts = [f"in the order of keys, expected {', '.join(known)}"]
        return "; ".join(parts) or "in the types of their containers"

    def _check_leaf(self, path: str, expected: TensorSpec | None, leaf: Any) -> None:
        guard = self._guards.get(path)
        if not isinstance(leaf, torch.Tensor) or expected is None:
            wanted = guard.value if guard is not None and expected is None else expected
            now = snapshot(leaf) if isinstance(wanted, Snapshot) else leaf
            if isinstance(leaf, torch.Tensor) or expected is not None or not _equal(now, wanted):
                raise MismatchError(f"{path}: expected {_show(wanted)}, got {_show(leaf)}")
            return
        if type(leaf) in PLAIN and leaf.__dict__ and (names := attributes_of(leaf)):
            raise MismatchError(f"{path} has attributes of its own ({', '.join(names)}), which would be lost")
        if tuple(leaf.shape) != expected.shape or leaf.dtype != expected.dtype:
            raise MismatchError(f"{path}: expected {_show(expected)}, got {_show(leaf)}")
        if guard is not None:
            self._check_contents(guard, leaf)
        if self._laid and layout_of(leaf) != self._guards[f"{STRIDES}{path}"].value:
            raise MismatchError(f"{path}: forward reads how tensors lie in memory, and this one lies otherwise")

    def _check_contents(self, guard: Guard, leaf: torch.Tensor) -> None:
        if not self._verdicts.of(guard.path, [leaf], partial(_is_equal, leaf, guard)):
            raise MismatchError(f"{guard.path}: its contents were read while tracing ({guard.reason}) and have changed")


def _is_equal(tensor: torch.Tensor, guard: Guard) -> bool:
    same_type = not tensor.is_meta and tensor.dtype == guard.value.dtype
    return same_type and torch.equal(tensor.detach().cpu(), guard.value)


def _holds(fact: Predicate, leaves: Mapping[str, Any]) -> bool:
    if any(leaves[path].is_meta for path in fact.paths):
        return False
    with torch.no_grad():
        return torch.equal(evaluate(fact, leaves).cpu(), fact.value)


def bind_inputs(
    forward: nn.Module | inspect.Signature, program: Program, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[torch.Tensor]:
    """The placeholders' values for one call, for which also the buffers of a module that is given are checked; keep an
    `InputBinder` for many calls."""
    if isinstance(forward, nn.Module):
        BufferGuards(forward, program).check()
    return InputBinder(forward, program, real=False)(args, kwargs)


def _equal(left: Any, right: Any) -> bool:
    if left is right or isinstance(left, ATOMS):
        return alike(left, right)
    try:
        return type(left) is type(right) and bool(left == right)
    except (RuntimeError, TypeError, ValueError):
        return False


def _show(item: Any) -> str:
    if isinstance(item, torch.Tensor):
        item = spec_of(item)
    if isinstance(item, TensorSpec):
        return f"{str(item.dtype).removeprefix('torch.')}{list(item.shape)}"
    return repr(item)
