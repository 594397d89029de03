"""What an inspection shows, as plain data: dataclasses of numbers, texts and lists, which become JSON as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from xdit_ir.planning.spans import Timeline


@dataclass(frozen=True)
class ExchangeView:
    """A communication: its kind, the mesh dims that talk, bytes that the busiest rank sends in one execution."""

    kind: str
    over: str
    bytes: int


@dataclass(frozen=True)
class ValueLine:
    """One value: `op` of `args` gives `name` of `type`; `dims` are the mesh dims that divide it."""

    name: str
    op: str
    args: str
    type: str
    dims: Sequence[str] = ()
    module: str = ""
    source: str = ""
    flops: int = 0
    exchange: ExchangeView | None = None
    fallback: str = ""


@dataclass(frozen=True)
class BodyView:
    """A block, shared by `calls` calls; FLOPs of one call on the slowest rank."""

    name: str
    calls: int
    inputs: Sequence[ValueLine]
    lines: Sequence[ValueLine]
    results: Sequence[str]
    flops: int = 0
    weight_bytes: int = 0


@dataclass(frozen=True)
class Box:
    """A node of the picture: an `input`, a `call` of a block, some `operators` around the blocks, or the `output`.

    `title` is the parameter prefix or module path; layers of one kind that may be shown as one have the same `run`.
    """

    id: str
    kind: str
    title: str
    block: str = ""
    run: int = -1
    stage: int = -1
    dims: Sequence[str] = ()
    flops: int = 0
    sent: int = 0
    lines: Sequence[ValueLine] = ()


@dataclass(frozen=True)
class Edge:
    """Values that go from box to box: names, with types."""

    source: str
    target: str
    values: Sequence[str]
    dims: Sequence[str] = ()


@dataclass(frozen=True)
class GraphView:
    """A program as a picture."""

    boxes: Sequence[Box]
    edges: Sequence[Edge]
    bodies: Mapping[str, BodyView]


@dataclass(frozen=True)
class PassStep:
    """What a pass left: for every graph that it changed (the outer one is "") its lines, as places in the table."""

    name: str
    does: str
    numerics: str
    graphs: Mapping[str, Sequence[int]]
    gone: Sequence[str] = ()


@dataclass(frozen=True)
class StageView:
    """A stage of a pipeline, at a place along `pipefusion`; for each patch it sends values to the next stage, and holds
    others for a later stage of its rank."""

    number: int
    place: int
    calls: int
    operators: int
    sends: Sequence[str]
    carried_out: Sequence[str] = ()


@dataclass(frozen=True)
class Figure:
    """A figure with its name, for the head of the page."""

    name: str
    value: str
    more: str = ""


@dataclass(frozen=True)
class Rows:
    """A table of the report."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    empty: str = ""


@dataclass(frozen=True)
class Inspection:
    """Everything; `lines` is the table of texts that passes refer to."""

    title: str
    model: str
    degrees: str
    mesh: Mapping[str, int]
    before: GraphView
    after: GraphView | None
    passes: Sequence[PassStep]
    lines: Sequence[str]
    facts: Sequence[Figure] = ()
    tables: Sequence[Rows] = ()
    stages: Sequence[StageView] = ()
    timeline: Timeline | None = None
    legend: Mapping[str, str] = field(default_factory=dict)
