"""What the tracer knows about each fake tensor: its node, its storage, and its contents where known."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import fx

from xdit_ir.ir.program import TensorSpec

KNOWN_NUMEL = 1 << 20
KNOWN_INPUT_NUMEL = 1 << 22


class Origin(Enum):
    """Where a value came from, apart from inputs."""

    PARAMETER = "the model's parameters"
    BUFFER = "the model's buffers"  # of the state itself; of values, see `FromBuffer`
    CONSTANT = "the model's constants"
    RANDOM = "random numbers"


@dataclass(frozen=True)
class FromBuffer:
    """The value came from a buffer of the model."""

    name: str

    @property
    def value(self) -> str:
        """As messages name it."""
        return f"the model's buffer {self.name!r}"


@dataclass(frozen=True)
class FromArgument:
    """Inside a block: the value came from an argument of the block."""

    frame: Frame
    index: int


Roots = frozenset[str | Origin | FromBuffer | FromArgument]
NO_ROOTS: Roots = frozenset()


@dataclass(frozen=True, eq=False)
class View:
    """One step from a tensor to a view of it: `func(*args, **kwargs)[index]`, its input being `args[0]`."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    index: int | None
    result: torch.Tensor
    pieces: tuple[TensorSpec, ...] = ()

    @property
    def source(self) -> torch.Tensor:
        """The tensor that is viewed."""
        source: torch.Tensor = self.args[0]
        return source


@dataclass(eq=False)
class Storage:
    """What views share: the node with the newest contents of the base tensor, and how often it was written.

    `owner` names the parameter or buffer behind it; `shared` says that values of another graph may alias it.
    """

    node: fx.Node | None
    version: int = 0
    owner: str = ""
    shared: bool = False
    members: list[TracedValue] = field(default_factory=list)


@dataclass(eq=False)
class TracedValue:
    """A fake tensor. `known` is its contents on the CPU, if nothing unreadable entered it.

    `frame` is None for parameters and buffers. `roots` are the inputs and state from which it was computed.
    """

    fake: torch.Tensor
    frame: Frame | None
    storage: Storage
    chain: tuple[View, ...]
    node: fx.Node | None
    version: int
    known: torch.Tensor | None
    roots: Roots


@dataclass(eq=False)
class Frame:
    """A graph under construction: the outer graph, or the body of a block called at `prefix`.

    `outer` are the arguments as the caller sees them, `reads` the arguments whose contents Python saw,
    `attributes` the (module path, name) of the watched attributes that Python saw, `strides` whether it saw how some
    tensor lies in memory.
    """

    prefix: str
    parent: Frame | None = None
    outer: list[TracedValue] = field(default_factory=list)
    graph: fx.Graph = field(default_factory=fx.Graph)
    placeholders: list[fx.Node] = field(default_factory=list)
    arguments: list[TracedValue] = field(default_factory=list)
    reads: set[int] = field(default_factory=set)
    attributes: set[tuple[str, str]] = field(default_factory=set)
    strides: bool = False
    state: dict[str, fx.Node] = field(default_factory=dict)
    constants: dict[int, TracedValue] = field(default_factory=dict)


def expand(roots: Roots) -> set[str | Origin | FromBuffer]:
    """Roots as they are outside of all blocks."""
    found: set[str | Origin | FromBuffer] = set()
    for root in roots:
        found |= expand(root.frame.outer[root.index].roots) if isinstance(root, FromArgument) else {root}
    return found


def ordinary(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that is an ordinary tensor although it was made in inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        return tensor.clone()


def spec_of(value: Any) -> Any:
    """The spec of a tensor, or the tuple of specs of a sequence of tensors."""
    if isinstance(value, torch.Tensor):
        return TensorSpec(tuple(int(size) for size in value.shape), value.dtype)
    return tuple(spec_of(item) for item in value)
