"""Compiled code of bodies, one for all shapes that differ in nothing but numbers which are arguments of it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

from xdit_ir.emission.code_store import LOG, CodeStore, KeptCode, LoadedCode, function_of
from xdit_ir.emission.lifting import lift
from xdit_ir.emission.structure import STRUCTURE, Structure, is_value
from xdit_ir.emission.template import ArgumentGraph, Template
from xdit_ir.emission.tracing import tracing
from xdit_ir.ir.graphs import placeholders
from xdit_ir.ir.program import dense_strides


class SharedCode:
    """A body with arguments for some of its numbers: behind what the body takes, empty tensors of these sizes.

    `kept`: where code of it is on disk, or goes; None: it is compiled in each process.
    """

    def __init__(
        self, structure: Structure, template: Template, options: Mapping[str, Any], kept: KeptCode | None = None
    ) -> None:
        self.template, self.options, self.kept = template, options, kept
        self._lifted = ArgumentGraph(structure, template)
        self.dynamic = self._lifted.dynamic
        self._loaded: LoadedCode | None = None

    def first(self, given: Sequence[torch.Tensor], marked: Sequence[torch.Tensor]) -> Any:
        """A call for which code may have to be made; `marked` are the same tensors, told which sizes may change."""
        if self.kept is not None:
            kept, self.kept = self.kept, None
            self._loaded = kept.load()
            if self._loaded is None or not self._loaded.takes(given):
                self._loaded = kept.make(function_of(self._lifted.graph), self.options, marked, self.template)
                if self._loaded is not None:
                    return self._loaded.run(*given)
        if self._loaded is not None and self._loaded.takes(given):
            return self._loaded.run(*given)
        with tracing():
            try:
                return self._traced(*marked)
            except FailOnRecompileLimitHit:  # other forms of inputs have used this copy up
                self._traced = self._compiled()
                return self._traced(*marked)

    def __call__(self, *given: torch.Tensor) -> Any:
        """The body's results."""
        loaded = self._loaded
        if loaded is not None and loaded.takes(given):
            return loaded.run(*given)
        return self._traced(*given)

    @cached_property
    def _traced(self) -> Callable[..., Any]:
        """What takes all that loaded code does not, and traces it."""
        return self._compiled()

    def _compiled(self) -> Callable[..., Any]:
        """A copy, compiled at its first call: as one graph, with the order of operators as it is written."""
        module = fx.GraphModule(nn.Module(), self._lifted.graph)
        return torch.compile(module.forward, fullgraph=True, dynamic=False, options=dict(self.options))

    def carriers(self, numbers: Sequence[int]) -> list[torch.Tensor]:
        """The tensors that carry those arguments which no size of a value is."""
        return [torch.empty(numbers[place], 0) for place in self._lifted.carried]


@dataclass(eq=False)
class Codes:
    """Those of one structure; `lifts`: it can be compiled with symbols, as far as is known. `store`: those on disk."""

    store: CodeStore | None = None
    found: list[SharedCode] = field(default_factory=list)
    lifts: bool = True

    def for_numbers(self, structure: Structure, options: Mapping[str, Any], device: torch.device) -> SharedCode:
        """One that is here, or on disk, or a new one: for as many other shapes as can be told from one."""
        for code in self.found:
            if code.template.fits(structure.numbers):
                return code
        if self.store is not None and (kept := self.store.find(structure, options)) is not None:
            return SharedCode(structure, kept[0], options, kept[1])
        if self.lifts:
            template = Template.of(structure.numbers, lift(structure, device))
            if template.fits(structure.numbers):
                return self._new(structure, template, options)
        return self.alone(structure, options)

    def alone(self, structure: Structure, options: Mapping[str, Any]) -> SharedCode:
        """A new one, for one shape."""
        return self._new(structure, Template.of(structure.numbers, structure.numbers), options)

    def _new(self, structure: Structure, template: Template, options: Mapping[str, Any]) -> SharedCode:
        kept = None if self.store is None else self.store.place(structure, options, template)
        return SharedCode(structure, template, options, kept)


class Shape:
    """The code of one body: that of its structure, one of `codes`, for its numbers."""

    def __init__(self, structure: Structure, options: Mapping[str, Any], codes: Codes) -> None:
        self._structure, self._options, self._codes = structure, options, codes
        self._values = [place for place, node in enumerate(placeholders(structure.graph)) if is_value(node)]
        self._turned: dict[Any, list[int]] = {}  # by strides of values: those that are brought into another form
        self._seen: set[Any] = set()

    def use(self, code: SharedCode) -> None:
        """From now on this code, which is added to those of the structure."""
        if code not in self._codes.found:
            self._codes.found.append(code)
        self._code = code
        self._carriers = code.carriers(self._structure.numbers)

    def __call__(self, *tensors: torch.Tensor) -> Any:
        """The body's results."""
        given = [*tensors, *self._carriers]
        strides = tuple([given[place].stride() for place in self._values])
        turned = self._turned.get(strides)
        if turned is None:
            turned = [place for place in self._values if one_form(given[place]) is not given[place]]
            self._turned[strides] = turned
        if turned:
            for place in turned:
                given[place] = one_form(given[place])
            strides = tuple([given[place].stride() for place in self._values])
        if strides in self._seen:
            return self._code(*given)
        result = self._first(given)
        self._seen.add(strides)
        return result

    def _first(self, given: Sequence[torch.Tensor]) -> Any:
        """A call for which code may have to be made: it is told which sizes may change."""
        marked = list(given)
        for place, dims in self._code.dynamic.items():
            marked[place] = given[place].detach()
            torch._dynamo.maybe_mark_dynamic(marked[place], dims)
        try:
            return self._code.first(given, marked)
        except TorchDynamoException as error:
            if not self._code.dynamic:
                raise
            LOG.debug("a body is compiled for each shape: %r", error)
        self._codes.lifts = False
        if self._code in self._codes.found:
            self._codes.found.remove(self._code)
        plain = given[: len(given) - len(self._carriers)]
        self.use(self._codes.alone(self._structure, self._options))
        return self._first(plain)


@dataclass(eq=False)
class SharedCodes:
    """Those of one model on one device, by structure. `tried` is for the trials of recordings, see there."""

    device: torch.device
    tried: dict[Hashable, bool] = field(default_factory=dict)
    store: CodeStore | None = None
    _found: dict[Hashable, Codes] = field(default_factory=dict)

    def of(self, module: fx.GraphModule, options: Mapping[str, Any]) -> Callable[..., Any] | None:
        """The code of a body; None if its structure cannot be compared."""
        structure = Structure.of(module)
        if structure is None:
            return None
        module.meta[STRUCTURE] = structure.key
        key = structure.key, tuple(sorted(options.items()))
        if key not in self._found:
            self._found[key] = Codes(self.store)
        codes = self._found[key]
        shape = Shape(structure, options, codes)
        shape.use(codes.for_numbers(structure, options, self.device))
        return shape


def one_form(x: torch.Tensor) -> torch.Tensor:
    """A tensor as compiled code wants it: dense, so that there is one form of it; a part of a dense one is copied, one
    that is repeated or has its dimensions in another order is left."""
    strides, dense = x.stride(), dense_strides(x.shape)
    if strides == dense:
        return x
    if x.is_contiguous():  # it differs where dimensions have one index
        return x.as_strided(x.shape, dense)
    wide = [stride for size, stride in zip(x.shape, strides, strict=True) if size > 1]
    return x.contiguous() if 0 not in wide and sorted(wide, reverse=True) == wide and x.numel() else x
