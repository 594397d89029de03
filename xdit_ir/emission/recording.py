"""A forward as CUDA graphs, and the host's work between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from xdit_ir.emission.codegen import Code
from xdit_ir.emission.execution import Tensors, first_line, is_watched
from xdit_ir.emission.graph_pool import GraphPool
from xdit_ir.emission.sections import RunBy, Section, cut_sections
from xdit_ir.emission.trial import Trial
from xdit_ir.ir.graphs import placeholders, results_of

Values = dict[str, Any]


@dataclass(frozen=True, eq=False)
class _Replay:
    """A CUDA graph: `fed` are the values that it reads at fixed places, `given` what it gives, in places of its own."""

    graph: torch.cuda.CUDAGraph
    fed: tuple[tuple[str, torch.Tensor], ...]
    given: Values

    def __call__(self, values: Values) -> None:
        for name, place in self.fed:
            place.copy_(values[name])
        self.graph.replay()
        values |= self.given


@dataclass(frozen=True, eq=False)
class _Call:
    """What the host runs."""

    section: Section
    code: Code

    def __call__(self, values: Values) -> None:
        values |= _run(self.section, self.code, [values[name] for name in self.section.takes])


class Recording:
    """A forward of which CUDA graphs hold all that they can.

    A trial run tells what they cannot hold: operators on tensors of the host, or that wait for the device, and opaque
    leaves. These are run by the host between the graphs. What depends on constants only is computed once.

    Args:
        code: takes the inputs, which are copied each time, and its state, which is used where it is.
        pool: memory shared with other recordings, of which no two are replayed at the same time.
        forced: raise where a section cannot be recorded; otherwise the host runs it, with a warning.
        tried: what trials have found of blocks, see `Trial`.
        at_once: at the first call; otherwise that is run only, which gives its results sooner, and the second one
            records. Whatever a rank records, it talks to the others as often as they do.
    """

    def __init__(
        self,
        code: Code,
        pool: GraphPool,
        *,
        forced: bool = True,
        tried: dict[Hashable, bool] | None = None,
        at_once: bool = True,
    ) -> None:
        self._code, self._pool, self._forced, self._tried, self._at_once = code, pool, forced, tried, at_once
        self._ran = False
        self._places = [node.name for node in placeholders(code.run.graph)]
        self._results = results_of(code.run.graph)
        self._sections: list[Section] = []
        self._addresses: list[Any] = []
        self._needed: list[int] = []  # what of the state is looked up at a call, by place
        self._once: Values = {}
        self._steps: list[_Replay | _Call] = []

    def __call__(self, inputs: Tensors, state: Tensors) -> Tensors:
        """The results for these inputs, in tensors of their own."""
        if is_watched():
            return list(self._code([*inputs, *state]))
        addresses = [(tensor.data_ptr(), tensor.stride()) for tensor in state]
        if self._steps and addresses == self._addresses:
            values = dict(zip(self._places, inputs, strict=False)) | self._once
            values |= {self._places[len(inputs) + place]: state[place] for place in self._needed}
            for step in self._steps:
                step(values)
        elif not self._ran and not self._at_once:
            return self._first([*inputs, *state])
        else:
            values = dict(zip(self._places, [*inputs, *state], strict=True))
            self._record(values, inputs, state)
            self._addresses = addresses
        return [values[node.name].clone() for node in self._results]

    def forget(self) -> None:
        """Free the graphs; the next call records anew. NCCL ends no communicator that a graph still refers to."""
        self._steps, self._once = [], {}

    def __str__(self) -> str:
        """What is recorded, and what the host does."""
        kinds = Counter(section.kind for section in self._sections)
        between = Counter(_name(node) for one in self._sections if one.kind is RunBy.HOST for node in _work(one))
        if self._ran and not self._sections:
            return "to be recorded at the next call"
        text = f"{kinds[RunBy.DEVICE]} CUDA graph{'s' if kinds[RunBy.DEVICE] != 1 else ''} a forward"
        if between:
            text += "; the host runs " + ", ".join(f"{name} ({count}x)" for name, count in between.items())
        return text

    def _first(self, tensors: Tensors) -> Tensors:
        """The results of a run that is not recorded, but compiles the code and makes communicators."""
        with self._pool.aside():
            results = self._code(tensors)
        self._ran = True
        return [x.clone() for x in results]

    def _record(self, values: Values, inputs: Tensors, state: Tensors) -> None:
        self.forget()
        with self._pool.aside() as device:
            if not self._sections:
                self._sections = self._try([*inputs, *state])
            places = dict[str, torch.Tensor]()
            varying = set(self._places[: len(inputs)])
            steps: list[_Replay | _Call] = []
            for section in self._sections:
                step: _Replay | _Call = _Call(section, self._code)
                if section.kind is RunBy.DEVICE and section.computes:
                    step = self._captured(section, values, varying, places, device)
                step(values)
                if section.kind is RunBy.HOST:
                    varying |= set(section.gives)
                if section.kind is RunBy.ONCE:
                    self._once |= {name: values[name] for name in section.gives}
                else:
                    steps.append(step)
        self._steps = steps
        taken = {name for step in steps if isinstance(step, _Call) for name in step.section.takes}
        taken |= {node.name for node in self._results}
        self._needed = [place for place, name in enumerate(self._places[len(inputs) :]) if name in taken]

    def _try(self, tensors: Tensors) -> list[Section]:
        """Run the forward, if it never was, so that it is compiled; then see what it does on the host."""
        if not self._ran:
            self._code(tensors)
        trial = Trial(self._code.run, self._code.unchanging, self._tried)
        trial.run(*tensors)
        self._code.finish()
        return cut_sections(*trial.kinds())

    def _captured(
        self, section: Section, values: Values, varying: set[str], places: dict[str, torch.Tensor], device: int
    ) -> _Replay | _Call:
        """A section as a CUDA graph, or run by the host if that fails."""
        new = [name for name in section.takes if name in varying and name not in places]
        places |= {name: values[name].clone() for name in new}
        given = [places[name] if name in places else values[name] for name in section.takes]
        graph = torch.cuda.CUDAGraph()
        try:
            with self._pool.recording(graph, device):
                results = _run(section, self._code, given)
        except Exception as error:
            if self._forced:
                raise
            self._code.note(f"a part cannot be recorded and is run by the host: {first_line(error)}")
            return _Call(section, self._code)
        fed = tuple((name, places[name]) for name in new)
        return _Replay(graph, fed, results)


def _run(section: Section, code: Code, given: Tensors) -> Values:
    results = dict(zip(section.gives, section.module(*given), strict=True))
    if section.talks:
        code.finish()
    return results


def _work(section: Section) -> Iterator[fx.Node]:
    return (node for node in section.module.graph.nodes if node.op in ("call_function", "call_module"))


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).split(".")[0]
