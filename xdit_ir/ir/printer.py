"""The textual form: stable, diff-able, one line a value, every type with its layout."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.graphs import arguments_of, placeholders
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.partition import Partition
from xdit_ir.ir.program import (
    LAYOUT,
    SPEC,
    WEIGHT,
    Program,
    TensorSpec,
    call_parts,
    is_block_call,
    is_weight,
    qualified,
)

DTYPES = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "bool",
    torch.complex64: "c64",
    torch.complex128: "c128",
}


def dimension_text(mesh: Mesh, size: int, partition: Partition | None) -> str:
    """One dimension, einops style: `4096/ulysses`, `(512+4096)/(ring*ulysses)`, uneven parts spelled out."""
    if partition is None:
        return str(size)
    varies = mesh.ordered(mesh.dividing_dims(partition))
    segments = _segments(partition)
    whole = f"({'+'.join(map(str, segments))})" if len(segments) > 1 else str(size)
    if not varies:
        return f"{whole}~reordered"
    over = varies[0] if len(varies) == 1 else f"({'*'.join(varies)})"
    text = f"{whole}/{over}"
    parts = [partition.sizes[rank] for rank in mesh.group(0, varies)]
    if sum(parts) > size:
        return text + "+halo"
    return text if len(set(parts)) == 1 else f"{text}[{','.join(map(str, parts))}]"


def _segments(partition: Partition) -> list[int]:
    """Lengths of the segments that every rank holds a run of, if the partition is even within segments."""
    counts = {len(part.runs) for part in partition.parts}
    if len(counts) != 1 or not 1 < (count := counts.pop()) <= 4:
        return [partition.size]
    columns = [sorted(part.runs[i] for part in partition.parts) for i in range(count)]
    spans = [(column[0][0], max(start + length for start, length in column)) for column in columns]
    joined = all(a[1] == b[0] for a, b in itertools.pairwise(spans))
    return [end - start for start, end in spans] if joined and spans[0][0] == 0 else [partition.size]


def type_text(spec: TensorSpec, layout: Layout | None, mesh: Mesh | None) -> str:
    """`bf16[2, (512+4096)/ulysses, 3072]`, with `partial(ulysses)` where a sum is pending."""
    name = DTYPES.get(spec.dtype, str(spec.dtype).removeprefix("torch."))
    if layout is None or mesh is None:
        return f"{name}[{', '.join(map(str, spec.shape))}]"
    dims = (dimension_text(mesh, size, p) for size, p in zip(spec.shape, layout.dims, strict=True))
    return f"{name}[{', '.join(dims)}]{partial_text(layout, mesh)}"


def partial_text(layout: Layout, mesh: Mesh) -> str:
    """` partial(ulysses)` where a sum is pending, else nothing."""
    return f" partial({', '.join(mesh.ordered(layout.partial))})" if layout.partial else ""


def node_type(node: fx.Node, mesh: Mesh | None) -> str:
    """The type of a node's value; a tuple's in parentheses."""
    spec, layout = node.meta[SPEC], node.meta.get(LAYOUT)
    if isinstance(spec, TensorSpec):
        return type_text(spec, layout, mesh)
    layouts = layout or [None] * len(spec)
    return f"({', '.join(type_text(s, where, mesh) for s, where in zip(spec, layouts, strict=True))})"


def target_name(target: Any) -> str:
    """`add.Tensor`, `linear`, `all_to_all`."""
    packet = getattr(target, "overloadpacket", None)
    if packet is None:
        return str(getattr(target, "__name__", target))
    overload = target._overloadname
    return packet.__name__ if overload == "default" else f"{packet.__name__}.{overload}"


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"@{value.meta.get(WEIGHT, value.target)}" if is_weight(value) else f"%{value.name}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_argument, value))}]"
    if isinstance(value, torch.dtype):
        return DTYPES.get(value, str(value))
    if isinstance(value, torch.device):
        return value.type  # every rank has another index, and all print the same program
    return str(value) if isinstance(value, torch.layout) else repr(value)


def node_text(node: fx.Node, mesh: Mesh | None) -> str:
    """One operator: `%name: type = op(arguments)`."""
    if node.op == "output":
        return f"return {', '.join(map(_argument, node.args[0]))}"  # type: ignore[arg-type]
    if node.target is operator.getitem:
        return f"%{node.name}: {node_type(node, mesh)} = {_argument(node.args[0])}[{node.args[1]}]"
    if is_block_call(node):
        return f"%{node.name} = {call_text(node, _argument)}"
    return f"%{node.name}: {node_type(node, mesh)} = {target_name(node.target)}({arguments_text(node)})"


def arguments_text(node: fx.Node) -> str:
    """`%x, @proj.weight, alpha=2`."""
    return ", ".join([_argument(a) for a in node.args] + [f"{k}={_argument(v)}" for k, v in node.kwargs.items()])


def _lines(graph: fx.Graph, mesh: Mesh | None) -> Iterator[str]:
    for node in graph.nodes:
        if node.op not in ("placeholder", "get_attr"):
            yield f"  {node_text(node, mesh)}"


def _parameters(graph: fx.Graph, mesh: Mesh | None) -> str:
    return ", ".join(f"%{node.name}: {node_type(node, mesh)}" for node in arguments_of(graph))


def body_text(program: Program, name: str) -> str:
    """One block with every operator of its body."""
    graph = program.blocks[name].graph
    lines = [f"block {name}({_parameters(graph, program.mesh)}) {{", *_lines(graph, program.mesh), "}"]
    return "\n".join(lines)


def program_text(program: Program, *, bodies: bool = False) -> str:
    """The program at block level; with `bodies`, every operator of the outer graph and of every block."""
    if bodies:
        return "\n\n".join([outer_text(program), *(body_text(program, name) for name in program.blocks)])
    mesh = program.mesh
    lines = [*_head(program), *_block_level(program, mesh), "}"]
    lines += [
        f"block {name}({_parameters(block.graph, mesh)}): {_summary(block.graph)}"
        for name, block in program.blocks.items()
    ]
    return "\n".join(lines)


def outer_text(program: Program) -> str:
    """The outer graph with every operator."""
    return "\n".join([*_head(program), *_lines(program.graph, program.mesh), "}"])


def _head(program: Program) -> list[str]:
    mesh = program.mesh
    over = "" if mesh is None else " on " + mesh_text(mesh)
    inputs = placeholders(program.graph)
    lines = [f"program {program.name}{over} {{", *(f"  input %{n.name}: {node_type(n, mesh)}" for n in inputs)]
    return lines + list(_seeds(program))


def _seeds(program: Program) -> Iterator[str]:
    """What is decided to be divided, but not divided yet."""
    if program.seeding is not None:
        seeds = program.seeding.seeds
        specs = {node.name: node.meta[SPEC] for node in program.graph.nodes if node.name in seeds}
        for name, layouts in seeds.items():
            types = (type_text(specs[name], layout, program.seeding.mesh) for layout in layouts)
            yield f"  seed %{name}: {', '.join(types)}"


def mesh_text(mesh: Mesh) -> str:
    """`cfg=2 ulysses=2`, or `1 rank`; sizes of 1 too where the mesh dims are in another order than usual."""
    wide = {name: size for name, size in mesh.degrees.items() if size > 1}
    named = wide if Mesh(tuple(wide), tuple(wide.values())) == mesh else mesh.degrees
    return " ".join(f"{name}={size}" for name, size in named.items()) or "1 rank"


def _block_level(program: Program, mesh: Mesh | None) -> Iterator[str]:
    """Calls a line each; operators in between are folded, except those whose value a call or the output takes."""
    folded = 0
    for node in program.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            continue
        if node.target is ops.unpack and all(map(is_block_call, node.users)):
            continue
        picks = node.target is operator.getitem and is_block_call(node.args[0])
        shown = node.op == "output" or is_block_call(node) or picks
        shown = shown or any(is_block_call(user) or user.op == "output" for user in node.users)
        if not shown:
            folded += 1
            continue
        if folded:
            yield f"  ... {folded} operators"
            folded = 0
        if not picks:
            yield f"  {_call_text(node, mesh) if is_block_call(node) else node_text(node, mesh)}"


def _call_text(node: fx.Node, mesh: Mesh | None) -> str:
    """A call with the results that are used, in one line."""
    picked = sorted(node.users, key=lambda user: user.args[1])  # type: ignore[arg-type, return-value]
    results = ", ".join(f"%{user.name}: {node_type(user, mesh)}" for user in picked)
    others = {w: None for w in call_parts(node).weights.values() if w.target is ops.unpack}
    packs = ", ".join(dict.fromkeys(_argument(weight.args[0]) for weight in others))
    text = call_text(node, lambda value: None if value in others else _argument(value))
    return f"{results} = {text}" + (f" with weights of {packs}" if packs else "")


def call_text(node: fx.Node, argument: Callable[[fx.Node], str | None]) -> str:
    """`Block<layers.0>(%x, proj.weight=%gathered)`: of the weights those that are not the layer's own, and of which
    `argument` says anything."""
    name, prefix, values, weights = call_parts(node)
    told = {key: argument(weight) for key, weight in weights.items()}
    others = (f"{key}={text}" for key, text in told.items() if text not in (None, f"@{qualified(prefix, key)}"))
    return f"{name}<{prefix}>({', '.join([*(str(argument(value)) for value in values), *others])})"


def _summary(graph: fx.Graph) -> str:
    counts: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_function" and node.target is not operator.getitem:
            name = target_name(node.target).partition(".")[0]
            counts[name] = counts.get(name, 0) + 1
    shown = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {name}" for name, count in shown)
