"""The IR: a `Program` is an outer graph over tensors, in which repeated layers are calls of shared `Block` bodies.

Both levels are `torch.fx.Graph`s of functional ATen operators. Conventions, checked by `xdit_ir.sharding.verify`:

* `placeholder`: one per tensor input (outer graph: tensor leaves of the inputs, in order; body: its arguments, then
  its weights, whose `meta[WEIGHT]` is their name relative to the prefix of a call).
* `get_attr`: a parameter or buffer by its qualified name in the model (outer graph only), or, below `CONSTANT`, a
  tensor constant of the program, in `Program.constants`; or, below `STORED`, what ranks hold parts of, in
  `Program.stored`.
* `call_function`: an ATen overload, an operator of `xdit_ir.ir.ops`, `operator.getitem`, or (outer graph only)
  `call_block(block_name, prefix, [values], {name: weight})`, which returns the tuple that the block's body returns. Its
  operands stand in the order of the body's placeholders. A weight is a value like any other; the usual one is the
  `get_attr` of its name below the prefix.
* `output`: one tuple of tensors.
* every node carries `meta[SPEC]`: a `TensorSpec` (or a tuple of them), and where known `meta[WHERE]`: a `Where`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.utils import _pytree as pytree

from xdit_ir.ir.effects import Effect, Literal
from xdit_ir.ir.facts import Fact
from xdit_ir.ir.guards import Guard, Predicate
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.partition import Runs

SPEC = "spec"
WHERE = "where"
LAYOUT = "layout"
# Of a placeholder of a body: the name of the weight that it stands for, relative to the prefix of a call.
WEIGHT = "weight"
# In a pipeline: the stage of a node of the outer graph; and a `ComputeScope`, where it is not EACH_PATCH.
STAGE = "stage"
SCOPE = "scope"
# Of what keeps keys and values in fewer bits between steps: bytes of an element in the model's own dtype.
BYTES_IN_FULL = "bytes in full"
CONSTANT = "_constant"
STORED = "_stored"


class ComputeScope(Enum):
    """Which patches of a pipeline compute a value in a step; the texts are those of the textual form."""

    EACH_PATCH = ""
    FIRST_PATCH = "once"  # only what the first patch alone computes uses it
    SHARED = "once shared"  # the first patch computes it, all patches use it

    @property
    def is_once(self) -> bool:
        """Whether the first patch alone computes it."""
        return self is not ComputeScope.EACH_PATCH


def dense_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a tensor whose elements lie one behind the other, in elements."""
    strides, stride = [], 1
    for size in reversed(shape):
        strides.append(stride)
        stride *= max(size, 1)
    return tuple(reversed(strides))


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor value."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count

    def on(self, layout: Layout, rank: int) -> TensorSpec:
        """That of what a rank has in this layout."""
        return TensorSpec(layout.local_shape(self.shape, rank), self.dtype)


Dims = tuple[Runs | None, ...]
"""Of each dim of a tensor the runs that are meant; None: all of it."""


@dataclass(frozen=True)
class Stored:
    """Weights that ranks hold as one tensor of type `spec`, of which each may have a part: the bytes of each weight
    begin at the offset beside its name. In a rank's program, `held` are the runs that it has of each dim. `on_host`: it
    lies in the host's memory, from which every use uploads it."""

    spec: TensorSpec
    members: tuple[tuple[str, int], ...]
    held: Dims | None = None
    on_host: bool = False


@dataclass(frozen=True)
class Where:
    """Origin of a node: module path (relative to the traced module) and the innermost source line of the model."""

    module: str = ""
    source: str = ""

    def below(self, prefix: str) -> str:
        """The module path, if the traced module is at `prefix`."""
        return ".".join(part for part in (prefix, self.module) if part)


def where_of(node: fx.Node) -> Where:
    """Where a node comes from; empty where that is not known."""
    where: Where = node.meta.get(WHERE, Where())
    return where


def scope_of(node: fx.Node) -> ComputeScope:
    """Which patches of a pipeline compute a node."""
    scope: ComputeScope = node.meta.get(SCOPE, ComputeScope.EACH_PATCH)
    return scope


@dataclass(frozen=True, eq=False)
class Block:
    """A body shared by all layers of equal structure; what differs between them, weights too, is given by each call."""

    name: str
    graph: fx.Graph


@dataclass(frozen=True)
class InputLeaf:
    """One leaf of the (canonicalised keyword) inputs. `spec` is None for a leaf that is no tensor."""

    path: str
    spec: TensorSpec | None


@dataclass(frozen=True)
class Signature:
    """How calls of the module become placeholders, and outputs become the module's result.

    `parameters` are the names of forward's parameters; inputs are first bound to these (`inspect.Signature.bind`),
    then flattened as a dict of the arguments that were given. `out_leaves[i]` is the index of a tensor in the
    graph's output tuple, or a `Literal` constant. `effects` happen after the call.
    """

    in_spec: pytree.TreeSpec
    leaves: tuple[InputLeaf, ...]
    out_spec: pytree.TreeSpec
    out_leaves: tuple[int | Literal, ...]
    guards: tuple[Guard, ...] = ()
    predicates: tuple[Predicate, ...] = ()
    effects: tuple[Effect, ...] = ()


def left_tensors(signature: Signature) -> frozenset[int]:
    """Which of a program's results forward leaves in what it was given, or in the model."""
    return frozenset(leaf for effect in signature.effects for leaf in effect.leaves if isinstance(leaf, int))


@dataclass(frozen=True)
class TokenAxis:
    """A stream of tokens: dimension `dim` of the outer value `value` becomes the queries of an attention.

    A `gathered` one reaches no queries (text for cross-attention): what is computed before `value` can be divided,
    and `value` gathered, or its keys be exchanged. `units` are inner factors by which views split
    it (rows, frames), `segments` the lengths into which it is cut.
    """

    value: str
    dim: int
    size: int
    units: tuple[int, ...] = ()
    segments: tuple[tuple[int, ...], ...] = ()
    is_context: bool = False


@dataclass(frozen=True)
class Seeding:
    """How values of the outer graph shall be divided over `mesh`: by name, the layouts to bring them into in turn."""

    mesh: Mesh
    seeds: Mapping[str, tuple[Layout, ...]]


@dataclass(frozen=True, eq=False)
class Program:
    """A captured model. `device` is the device it was traced on: nodes that name it mean "the running device".

    In a pipeline, `coordinates[stage]` is where along `pipefusion` a stage is computed. `facts` is what passes have
    made true of it; `seeding` is there from when it is decided until layouts are written. `stored` is how ranks hold
    those weights of `state` of which they have parts. `contents` are those of integer inputs, masks and buffers while
    it was traced, which hold for other calls only if they become guards. `spare`: nobody else has its graphs, so that
    the pass which gets it may edit them.
    """

    name: str
    graph: fx.Graph
    blocks: Mapping[str, Block]
    signature: Signature
    constants: Mapping[str, torch.Tensor]
    device: torch.device
    state: Mapping[str, TensorSpec] = field(default_factory=dict)
    contents: Mapping[str, torch.Tensor] = field(default_factory=dict)
    stored: Mapping[str, Stored] = field(default_factory=dict)
    mesh: Mesh | None = None
    tokens: tuple[TokenAxis, ...] = ()
    coordinates: tuple[int, ...] = ()
    seeding: Seeding | None = None
    facts: frozenset[Fact] = frozenset()
    spare: bool = False

    def replace(self, **changes: Any) -> Program:
        """A copy with fields changed; graphs are shared, so whoever edits one copies it first."""
        return replace(self, **changes)

    def with_graph(self, graph: fx.Graph) -> Program:
        """The program with another outer graph, and only the blocks that this calls."""
        used = {called_block(node) for node in graph.nodes if is_block_call(node)}
        blocks = {name: block for name, block in self.blocks.items() if name in used}
        return replace(self, graph=graph, blocks=blocks)

    @property
    def layout_mesh(self) -> Mesh | None:
        """The mesh on which every value has a layout; None where values have none."""
        return None if Fact.LOCAL in self.facts else self.mesh

    @property
    def graphs(self) -> tuple[fx.Graph, ...]:
        """The outer graph, then those of the blocks."""
        return self.graph, *(block.graph for block in self.blocks.values())

    @property
    def calls(self) -> Iterator[fx.Node]:
        """The block calls of the outer graph, in order."""
        return iter(self.graph.find_nodes(op="call_function", target=call_block))


def call_block(
    block: str, prefix: str, values: list[torch.Tensor], weights: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """Target of a block call in the outer graph; only interpreters give it a meaning."""
    raise AssertionError("call_block is interpreted, never executed")


def is_block_call(node: fx.Node) -> bool:
    """Whether a node of an outer graph calls a block."""
    return node.op == "call_function" and node.target is call_block


class CallParts(NamedTuple):
    """What a block call says: the block's name, the prefix of its layer, its values, its weights by relative name."""

    block: str
    prefix: str
    values: list[fx.Node]
    weights: dict[str, fx.Node]


def call_parts(node: fx.Node) -> CallParts:
    """The parts of a block call."""
    name, prefix, values, weights = node.args
    return CallParts(str(name), str(prefix), list(values), dict(weights))  # type: ignore[arg-type]


def called_block(node: fx.Node) -> str:
    """The name of the block that a call calls."""
    return str(node.args[0])


def is_weight(node: fx.Node) -> bool:
    """Whether a node stands for a parameter, buffer or constant."""
    return node.op == "get_attr" or WEIGHT in node.meta


def qualified(prefix: str, name: str) -> str:
    """The model-wide name of a parameter that a body names relative to `prefix`; constants are never relative."""
    return name if not prefix or name.startswith(CONSTANT + ".") else f"{prefix}.{name}"
