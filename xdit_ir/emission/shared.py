"""Compiled code of bodies, one for all shapes that differ in nothing but numbers which are arguments of it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

from xdit_ir.emission.lifting import lift
from xdit_ir.emission.structure import STRUCTURE, Structure, is_value
from xdit_ir.emission.template import ArgumentGraph, Template
from xdit_ir.ir.graphs import placeholders
from xdit_ir.ir.program import dense_strides


class SharedCode:
    """A body with arguments for some of its numbers: behind what the body takes, empty tensors of these sizes."""

    def __init__(self, structure: Structure, template: Template, options: Mapping[str, Any]) -> None:
        self.template, self.options = template, options
        self._lifted = ArgumentGraph(structure, template)
        self.dynamic = self._lifted.dynamic
        self.run = self.compiled()

    @staticmethod
    def of(structure: Structure, options: Mapping[str, Any], device: torch.device) -> SharedCode | None:
        """For as many other shapes as can be told from one; None if that is none."""
        template = Template.of(structure.numbers, lift(structure, device))
        return SharedCode(structure, template, options) if template.fits(structure.numbers) else None

    @staticmethod
    def alone(structure: Structure, options: Mapping[str, Any]) -> SharedCode:
        """For one shape."""
        return SharedCode(structure, Template.of(structure.numbers, structure.numbers), options)

    def compiled(self) -> Callable[..., Any]:
        """Another copy, compiled at its first call: as one graph, with the order of operators as it is written."""
        module = fx.GraphModule(nn.Module(), self._lifted.graph)
        return torch.compile(module.forward, fullgraph=True, dynamic=False, options=dict(self.options))

    def carriers(self, numbers: Sequence[int]) -> list[torch.Tensor]:
        """The tensors that carry those arguments which no size of a value is."""
        return [torch.empty(numbers[place], 0) for place in self._lifted.carried]


@dataclass(eq=False)
class Codes:
    """Those of one structure; `lifts`: it can be compiled with symbols, as far as is known."""

    found: list[SharedCode] = field(default_factory=list)
    lifts: bool = True


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
        self._code, self._run = code, code.run
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
            return self._run(*given)
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
            return self._run(*marked)
        except FailOnRecompileLimitHit:  # other forms of inputs have used this copy up
            self._run = self._code.run = self._code.compiled()
            return self._run(*marked)
        except TorchDynamoException:
            if not self._code.dynamic:
                raise
        self._codes.lifts = False
        if self._code in self._codes.found:
            self._codes.found.remove(self._code)
        plain = given[: len(given) - len(self._carriers)]
        self.use(SharedCode.alone(self._structure, self._options))
        return self._first(plain)


@dataclass(eq=False)
class SharedCodes:
    """Those of one model on one device, by structure. `tried` is for the trials of recordings, see there."""

    device: torch.device
    tried: dict[Hashable, bool] = field(default_factory=dict)
    _found: dict[Hashable, Codes] = field(default_factory=dict)

    def of(self, module: fx.GraphModule, options: Mapping[str, Any]) -> Callable[..., Any] | None:
        """The code of a body; None if its structure cannot be compared."""
        structure = Structure.of(module)
        if structure is None:
            return None
        module.meta[STRUCTURE] = structure.key
        codes = self._found.setdefault((structure.key, tuple(sorted(options.items()))), Codes())
        code = next((code for code in codes.found if code.template.fits(structure.numbers)), None)
        if code is None:
            lifts = SharedCode.of(structure, options, self.device) if codes.lifts else None
            code = lifts or SharedCode.alone(structure, options)
        shape = Shape(structure, options, codes)
        shape.use(code)
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
