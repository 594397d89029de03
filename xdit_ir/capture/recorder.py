"""The state of a trace: fake tensors, the nodes that hold their contents, weights and constants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any

import torch
from torch import fx
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from xdit_ir.capture.failures import Unshareable
from xdit_ir.capture.fast_fakes import quick_result
from xdit_ir.capture.odd_weights import Casts, odd_tensor
from xdit_ir.capture.selected import Selections
from xdit_ir.capture.source import source_line
from xdit_ir.capture.values import KNOWN_NUMEL, NO_ROOTS, FromBuffer, Origin, Roots, Storage, TracedValue, spec_of
from xdit_ir.capture.writer import GraphWriter
from xdit_ir.errors import TraceError
from xdit_ir.ir.guards import Predicate
from xdit_ir.ir.program import CONSTANT, SPEC, Where
from xdit_ir.ir.wrappers import is_wrapper, with_parts
from xdit_ir.reflection.fakes import as_plain, device_of, is_fake, run_on_fakes
from xdit_ir.reflection.tensors import contents, map_tensors, tensors_in


class Recorder(GraphWriter):
    """Writes the graphs of one trace, and knows the `TracedValue` of every fake tensor.

    Fake tensors pretend to be on `device`. In place of the meta device that is the CPU: there, what the model's
    code makes without naming a device, autocast and literals are as they will be when the program runs.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.hollow = device.type == "meta"
        self.device = torch.device("cpu") if self.hollow else device
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.active = True
        self.selections: Selections | None = None
        self.entry: CodeType | None = None
        self.constants: dict[str, torch.Tensor] = {}
        self.placed: dict[str, torch.device] = {}
        self.held: dict[int, torch.Tensor] = {}
        self.odd: dict[int, str] = {}  # why a tensor that somebody holds cannot be used, by the id of its fake
        self.inputs: dict[str, torch.Tensor] = {}
        self.read_inputs: dict[str, str] = {}
        self.read_layouts = ""  # where Python read how a tensor lies in memory
        self.read_buffers: dict[str, str] = {}
        self.asked: dict[str, tuple[Any, str]] = {}  # of PyTorch by Python: the answer, and where
        self.buffers: dict[str, torch.Tensor] = {}
        self.weights: dict[str, torch.Tensor] = {}
        self.tables: dict[str, tuple[TracedValue, torch.Tensor]] = {}
        self.casts: Casts = {}
        self.filled: dict[str, torch.Tensor] = {}
        self.predicates: list[Predicate] = []
        self.lent: list[tuple[Any, Any, torch.Tensor, int | None]] = []  # arrays, what they held, of which tensors
        self._values: dict[int, TracedValue] = {}
        self._twins: list[torch.Tensor] = []  # so that their ids stay theirs
        self._state_names: dict[int, list[str]] = {}
        self.outside: dict[int, str] = {}
        self.state_of: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor

    @contextmanager
    def recording(self, active: bool) -> Iterator[None]:
        """Whether operators that run are the model's own, and so recorded."""
        before, self.active = self.active, active
        try:
            yield
        finally:
            self.active = before

    def tensor(self, node: fx.Node, roots: Roots) -> torch.Tensor:
        """A fake tensor for the value of a node of the current frame."""
        spec = node.meta[SPEC]
        with self.recording(False), torch.inference_mode(), self.fake_mode:
            fake = as_plain(torch.empty(spec.shape, dtype=spec.dtype, device=self.device))
        self.bind(fake, node, None, roots)
        return fake

    def blank(self, like: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
        """A new fake tensor with the size, strides and dtype of `like`."""
        device = device or (self.device if device_of(like).type == "meta" else device_of(like))
        with torch._C._DisableFuncTorch(), torch.inference_mode():  # first asked for under a transform
            plain = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="meta")
            return as_plain(FakeTensor(self.fake_mode, plain, device))  # ten times as fast as to ask the mode for it

    def fake(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator on fake tensors, unrecorded."""
        with torch.inference_mode():
            if (plain := quick_result(func, args, kwargs)) is not None:
                return as_plain(FakeTensor(self.fake_mode, plain, device_of(tensors_in(args)[0])))
        with self.fake_mode:
            return run_on_fakes(func, args, kwargs)

    def fake_uncached(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The same, past the cache of results, which forgets that a composite operator gave a view."""
        before, self.fake_mode.cache_enabled = self.fake_mode.cache_enabled, False
        try:
            return self.fake(func, args, kwargs)
        finally:
            self.fake_mode.cache_enabled = before

    def add(self, value: TracedValue) -> TracedValue:
        """Remember what is known about a fake tensor."""
        value.storage.members.append(value)
        self._values[id(value.fake)] = value
        return value

    def bind(self, fake: torch.Tensor, node: fx.Node, known: torch.Tensor | None, roots: Roots) -> TracedValue:
        """Register a tensor with storage of its own in the current frame."""
        return self.add(TracedValue(fake, self.frame, Storage(node), (), node, 0, known, roots))

    def input(
        self, name: str, like: torch.Tensor, device: torch.device, known: torch.Tensor | None, root: Any
    ) -> TracedValue:
        """A placeholder of the current frame."""
        fake = self.blank(like, device)
        node = self.emit("placeholder", name, (), {}, spec_of(fake), Where(), name)
        value = self.bind(fake, node, known, frozenset({root}))
        self.frame.arguments.append(value)
        self.frame.placeholders.append(node)
        return value

    def state(self, names: list[str], real: torch.Tensor, origin: Origin) -> torch.Tensor:
        """The fake that stands for a parameter or another tensor of a module.

        Its `get_attr` is written at its first use in a frame. A wrapper is one of fakes for its parts.
        """
        if is_wrapper(real):
            with self.recording(False):
                return with_parts(real, lambda part, inner: self.state([f"{x}.{part}" for x in names], inner, origin))
        with self.recording(False):
            fake = self.blank(real, self.device if self.hollow else None)  # where its weights will be, so will be this
            carried = origin is not Origin.PARAMETER and real.device.type != "meta"
            known = contents(real) if carried and real.numel() <= KNOWN_NUMEL else None
            if origin is Origin.BUFFER and known is not None:
                self.buffers[names[0]] = known.clone()
        if origin is Origin.PARAMETER and real.device.type != "meta":
            self.weights[names[0]] = real
        if origin is Origin.CONSTANT and real.device.type == "meta":
            raise TraceError(f"the model holds a tensor without contents, {names[0]!r}, outside of its attributes")
        if origin is Origin.CONSTANT:
            if (odd := odd_tensor(names[0], real)) is not None:
                self.odd[id(fake)] = odd
            names = [f"{CONSTANT}.{self.keep(real, names[0])}"]
            self.held[id(fake)] = real
        roots: Roots = frozenset({FromBuffer(names[0]) if origin is Origin.BUFFER else origin})
        value = self.add(TracedValue(fake, None, Storage(None, owner=names[0]), (), None, 0, known, roots))
        if known is not None:
            self.tables[names[0]] = value, real
        self._state_names[id(fake)] = names
        return fake

    def twin(self, fake: torch.Tensor) -> torch.Tensor:
        """Another fake tensor for the same value."""
        made = self.blank(fake, device_of(fake))
        self._twins.append(made)
        self._values[id(made)] = self.value(fake)
        return made

    def keep(self, real: torch.Tensor, name: str = "literal") -> str:
        """A name for a tensor constant of the program."""
        name = f"{name.replace('.', '_')}_{len(self.constants)}"
        self.constants[name] = real
        return name

    def place(self, name: str) -> torch.device:
        """Where a constant will be."""
        return self.placed.get(name, self.constants[name].device)

    def constant(self, real: torch.Tensor, name: str = "literal", device: torch.device | None = None) -> TracedValue:
        """A value of the current frame for a real tensor that the model's code made or holds.

        It is meant to be on `device`, wherever its contents are now.
        """
        found = self.frame.constants.get(id(real))
        if found is not None:
            return found
        if real.device.type == "meta":
            raise TraceError(
                f"{source_line()}: uses a tensor on the meta device that is neither an input nor an attribute "
                "of a module, so that its contents are lost; make it an input or a buffer"
            )
        if (odd := odd_tensor(self.outside.get(id(real), "a tensor that forward reads"), real)) is not None:
            raise TraceError(f"{source_line()}: {odd}")
        name = self.keep(real, name)
        fake = self.blank(real, None if device is None or device.type == "meta" else device)
        self.placed[name] = device_of(fake)
        node = self.emit("get_attr", f"{CONSTANT}.{name}", (), {}, spec_of(fake), self.where(), name)
        known = contents(real) if real.numel() <= KNOWN_NUMEL else None
        self.frame.constants[id(real)] = value = self.bind(fake, node, known, NO_ROOTS)
        return value

    def value(self, tensor: torch.Tensor) -> TracedValue:
        """What is known about a tensor; a real one becomes state or a constant."""
        found = self._values.get(id(tensor))
        if found is not None:
            return found
        if is_fake(tensor) or is_functorch_wrapped_tensor(tensor):
            raise Unshareable("a tensor from outside the trace, or one that a transform of torch.func follows")
        fake = self.state_of(tensor)
        if fake is not tensor:
            return self._values[id(fake)]
        made = self.constant(tensor)
        made.storage.owner = self.outside.get(id(tensor), "")
        return made

    def found(self, tensor: torch.Tensor) -> TracedValue | None:
        """What is known about a fake tensor; None if it is not of this trace."""
        return self._values.get(id(tensor))

    def roots(self, tensors: list[torch.Tensor]) -> Roots:
        """All that a result of these tensors depends on."""
        return NO_ROOTS.union(*(self.value(tensor).roots for tensor in tensors))

    def call(self, func: Any, args: Any, kwargs: Any, spec: Any) -> fx.Node:
        """Append an operator call whose arguments are fake tensors, nodes and literals."""
        return super().call(func, map_tensors(args, self.node), map_tensors(kwargs, self.node), spec)

    def node(self, tensor: torch.Tensor) -> fx.Node:
        """The node that holds a tensor's contents now, in the current frame."""
        value = self.value(tensor)
        if value.storage.owner in self.filled and value.known is not None:
            return self._filled_node(value, value.known)
        if value.frame is None:
            return self._state_node(value)
        if value.frame is not self.frame:
            raise Unshareable("uses a tensor that was not passed to it")
        if value.version != value.storage.version:
            assert value.storage.node is not None
            value.node = self.replay(value.storage.node, value.chain)
            value.version = value.storage.version
        assert value.node is not None
        return value.node

    def _filled_node(self, value: TracedValue, known: torch.Tensor) -> fx.Node:
        """A table that forward has just filled, as a constant; the next trace finds it filled."""
        node = self.constant(known.clone(), value.storage.owner, device_of(value.fake)).node
        assert node is not None
        return node

    def _state_node(self, value: TracedValue) -> fx.Node:
        name = self.relative(self._state_names[id(value.fake)])
        if name is None:
            raise Unshareable("uses a parameter of another module")
        if id(value.fake) in self.odd:
            raise TraceError(f"{source_line()}: {self.odd[id(value.fake)]}")
        if name not in self.frame.state:
            spec = spec_of(value.fake)
            self.frame.state[name] = self.emit("get_attr", name, (), {}, spec, self.where(), name.replace(".", "_"))
        return self.frame.state[name]
