"""One attempt to capture a forward: a copy of the model runs on fake tensors, and every operator is recorded."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from xdit_ir.capture.assemble import program_of, signature_of
from xdit_ir.capture.blocks import Blocks
from xdit_ir.capture.caches import clean_caches
from xdit_ir.capture.derivatives import recorded_derivatives
from xdit_ir.capture.dressed import dressed, dressing
from xdit_ir.capture.effects import ArgumentState
from xdit_ir.capture.failures import RaisedByForward, ShapeDepends, Unshareable
from xdit_ir.capture.flex import uncompiled
from xdit_ir.capture.generators import given_generator
from xdit_ir.capture.identity import Identities
from xdit_ir.capture.inputs import call_arguments, flatten_named, sharing
from xdit_ir.capture.instrument import Calls, instrument
from xdit_ir.capture.kept_state import Writes, writes_of
from xdit_ir.capture.known import readable
from xdit_ir.capture.ladder import Rung
from xdit_ir.capture.leaves import Leaves
from xdit_ir.capture.libraries import replacements
from xdit_ir.capture.marks import Marks
from xdit_ir.capture.mode_guards import noted
from xdit_ir.capture.odd_weights import uncast
from xdit_ir.capture.outputs import attributes_of
from xdit_ir.capture.overwrites import Overwrite, beside, overwrites
from xdit_ir.capture.python_reads import PythonReads, check_lent
from xdit_ir.capture.recorder import Recorder
from xdit_ir.capture.repeats import Repeats
from xdit_ir.capture.selected import Selections
from xdit_ir.capture.skeleton import Skeleton, watch
from xdit_ir.capture.source import failing_line, is_raised_outside
from xdit_ir.capture.state import StateWatch
from xdit_ir.capture.tracer import Tracer
from xdit_ir.capture.values import TracedValue
from xdit_ir.errors import TraceError, XditError
from xdit_ir.ir.effects import Effect
from xdit_ir.ir.garbage import collector_paused
from xdit_ir.ir.program import Program
from xdit_ir.reflection.fingerprint import Fingerprints
from xdit_ir.reflection.references import Functions, replaced
from xdit_ir.reflection.tree import named_modules_of

Flat = list[tuple[str, Any]]
Captured = tuple[Program, Writes, Sequence[Overwrite]]
"""A program, what forward left in Python objects, and what of that the program's effects do."""


@dataclass(frozen=True)
class Attempt:
    """A capture of forward for arguments that are `named`, or given by their places; the `rung` has the model, its
    blocks and its leaves. `keep`: forward is told of the caller's mode. `overwrite`: what it leaves in the model
    without having read it becomes effects. `marked`: as for `trace`."""

    rung: Rung
    named: dict[str, Any]
    by_name: bool
    keep: bool
    overwrite: bool
    marked: Mapping[str, int]

    def run(self, selections: Selections | None) -> Captured:
        """What is captured; raises one of `FAILURES` where it cannot be done on this rung."""
        model = self.rung.model
        functions = replacements(model)
        with collector_paused(), clean_caches(model), replaced(functions, model.modules()):
            return copy_context().run(self._recorded, functions, selections)  # a context variable cannot be unset

    def _recorded(self, functions: Functions, selections: Selections | None) -> Captured:
        model = self.rung.model
        leaves, in_spec = flatten_named(self.named)
        device = _device(model, leaves)
        recorder = Recorder(device)
        recorder.selections = selections
        values = {path: _input(recorder, path, x) for path, x in leaves if isinstance(x, torch.Tensor)}
        args = {path: values[path].fake if path in values else given_generator(leaf) for path, leaf in leaves}
        if self.keep:  # one tensor for two arguments is one in forward too; who calls compares that
            first: dict[int, str] = {}
            args |= {path: args[first.setdefault(id(x), path)] for path, x in leaves if path in values}
        with (
            noted(recorder.asked, model, as_called=self.keep),
            _watched(model, Skeleton(model, recorder.state, functions, partial(dressed, recorder)), args, in_spec) as (
                skeleton,
                given,
                watch,
            ),
        ):
            recorder.state_of, recorder.outside = skeleton.state_of, watch.outside
            calls = self._calls(recorder)
            instrument(skeleton, calls)
            calls.blocks.watched = _watch(skeleton, self.rung.blocks, recorder, calls.blocks.prints)
            call = call_arguments(inspect.signature(model.forward), given.named, self.by_name)
            with calls.repeats.blamed():
                output = _run(skeleton.model, recorder, *call)
            check_lent(recorder)
            found = list(watch.changes())
            made = overwrites(found, skeleton.originals, recorder, model) if self.overwrite else []

            def effects(place: Callable[[torch.Tensor], int]) -> tuple[Effect, ...]:
                return (*given.effects(values, place), *(one.effect(place) for one in made))

            signature = signature_of(recorder, leaves, in_spec, output, skeleton.originals, effects)
            if any(effect.write for effect in signature.effects) and (pair := sharing(leaves)):
                raise TraceError(f"{' and '.join(pair)} share memory, and forward writes to what it is given")
            originals = skeleton.originals
            writes = [beside(write, originals.get(id(write.part.item), write.part.item), made) for write in found]
            left_there = writes_of(writes, skeleton, recorder)
        program = program_of(type(model).__name__, device, recorder, calls.blocks, signature)
        skeleton.let_go()
        calls.blocks.prints.let_go()
        return program, left_there, made

    def _calls(self, recorder: Recorder) -> Calls:
        """What becomes of calls of submodules: of blocks, of leaves, of those that repeat or are marked."""
        rung = self.rung
        chosen = {(path, "forward") for path in rung.blocks} | rung.repeated
        blocks = Blocks(recorder, chosen)
        leaves = Leaves(recorder, rung.leaves, dict(named_modules_of(rung.model)))
        marks = Marks(recorder, self.marked)
        blocks.chosen_below = lambda path: (leaves.below(path), marks.below(path))
        return Calls(recorder, blocks, leaves, Repeats(recorder, blocks, rung.repeated, rung.never), marks)


@contextmanager
def _watched(
    model: nn.Module, skeleton: Skeleton, args: Mapping[str, Any], spec: pytree.TreeSpec
) -> Iterator[tuple[Skeleton, ArgumentState, StateWatch]]:
    """A copy to be traced, and its arguments; what its forward does to objects that are no copies is put back."""
    given, identities = ArgumentState(args, spec, skeleton.copy_of), Identities(model, skeleton)
    given.check_referring(identities)
    watch = StateWatch([("", skeleton.model), *given.callables])
    try:
        watch.exchange(identities.exchanged)
        yield skeleton, given, watch
        watch.check_draws()
    finally:
        watch.restore(skeleton.originals)


def _device(model: nn.Module, leaves: Flat) -> torch.device:
    """The device on which a model runs."""
    inputs = (leaf for _, leaf in leaves if isinstance(leaf, torch.Tensor))
    for tensors in (model.parameters(), model.buffers(), inputs):
        for tensor in tensors:
            return tensor.device
    return torch.device("cpu")


def _input(recorder: Recorder, path: str, leaf: torch.Tensor) -> TracedValue:
    if names := attributes_of(leaf):
        raise TraceError(f"input {path!r} has attributes of its own ({', '.join(names)}), which would be lost")
    if leaf.layout is not torch.strided or leaf.is_nested or leaf.is_quantized:
        kind = "nested" if leaf.is_nested else "quantized" if leaf.is_quantized else str(leaf.layout)
        raise TraceError(
            f"input {path!r} is a {kind} tensor; expected a dense one, such as to_dense() or padding gives"
        )
    recorder.inputs[path] = leaf
    name = "".join(char if char.isalnum() else "_" for char in path).strip("_")
    known = leaf.detach().cpu().clone() if readable(leaf) else None
    return recorder.input(name, leaf, recorder.device, known, path)


def _watch(
    skeleton: Skeleton, chosen: Iterable[str], recorder: Recorder, found: Fingerprints
) -> dict[str, set[tuple[str, str]]]:
    """Watch the plain attributes in which blocks of equal structure differ, such as the index of a layer."""
    prints = {path: found.of(skeleton.modules[path]) for path in chosen}
    groups: list[list[str]] = []
    for path, print_ in prints.items():
        group = next((group for group in groups if prints[group[0]].structure == print_.structure), None)
        if group is None:
            groups.append([path])
        else:
            group.append(path)
    watched: dict[str, set[tuple[str, str]]] = {}
    for paths in groups:
        differing = set().union(*(prints[path].differs_from(prints[paths[0]]) for path in paths))
        for path in paths if differing else ():
            watched[path] = differing
            for owner in {owner for owner, _ in differing}:
                names = {name for other, name in differing if other == owner}
                _watch_module(skeleton.modules.get(f"{path}.{owner}".rstrip(".")), owner, names, recorder)
    return watched


def _watch_module(module: nn.Module | None, owner: str, names: set[str], recorder: Recorder) -> None:
    if module is not None:
        watch(module, names, lambda name: recorder.frame.attributes.add((owner, name)))


def _run(model: nn.Module, recorder: Recorder, args: list[Any], kwargs: dict[str, Any]) -> Any:
    recorder.entry = _run.__code__
    try:
        with uncompiled(), recorded_derivatives(), dressing(recorder), Tracer(recorder), PythonReads(recorder):
            output = model(*args, **kwargs)
            uncast(recorder.casts)
            return output
    except (XditError, Unshareable, ShapeDepends):
        raise
    except Exception as error:
        text = f"{failing_line(error)}: {type(error).__name__}: {error}"
        if is_raised_outside(error):
            raise RaisedByForward(text, error) from error
        raise TraceError(text) from error
