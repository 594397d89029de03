"""Facts about floating-point inputs that Python reads: small programs, run again at each call on new contents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch._C._functorch import is_functorch_wrapped_tensor

from xdit_ir.capture.failures import Unshareable
from xdit_ir.capture.recorder import Recorder
from xdit_ir.capture.source import source_line
from xdit_ir.capture.values import KNOWN_NUMEL, FromBuffer, Origin, Roots, TracedValue
from xdit_ir.ir.guards import Predicate
from xdit_ir.ir.program import CONSTANT

_SUMMARY = 64


def predicate(recorder: Recorder, value: TracedValue, what: str) -> Predicate | None:
    """The program that computes a value from inputs alone, if it is a small mask or integer outside of blocks."""
    dtype = value.fake.dtype
    small = value.fake.numel() <= _SUMMARY and not (dtype.is_floating_point or dtype.is_complex)
    if not small or recorder.frame.parent is not None or not all(isinstance(root, str) for root in value.roots):
        return None
    if any(recorder.inputs[str(path)].is_meta for path in value.roots):
        return None
    graph, paths = _cone(recorder, recorder.node(value.fake))
    names = [str(node.target) for node in graph.nodes if node.op == "get_attr"]
    if any(not name.startswith(f"{CONSTANT}.") for name in names):
        return None
    constants = {name: recorder.constants[name.partition(".")[2]] for name in names}
    found = Predicate(graph, paths, constants, torch.empty(0), f"{source_line()} ({what})")
    with torch.no_grad():
        known = evaluate(found, recorder.inputs).cpu()
    return Predicate(graph, paths, constants, known, found.reason)


def computed(recorder: Recorder, value: TracedValue) -> torch.Tensor | None:
    """Contents, however many, of what was computed outside of blocks from nothing but constants; None of others."""
    if value.frame is None or value.frame.parent is not None:
        return None
    graph, paths = _cone(recorder, recorder.node(value.fake))
    names = [str(node.target) for node in graph.nodes if node.op == "get_attr"]
    if paths or any(not name.startswith(f"{CONSTANT}.") for name in names):
        return None
    constants = {name: recorder.constants[name.partition(".")[2]] for name in names}
    if any(map(is_functorch_wrapped_tensor, constants.values())):
        return None
    with torch.no_grad():
        return evaluate(Predicate(graph, paths, constants, torch.empty(0)), {})


def weighed(recorder: Recorder, value: TracedValue, what: str) -> torch.Tensor | None:
    """A number or flag that follows from the model's weights alone, which are guarded then; None of others."""
    if value.fake.numel() > _SUMMARY or not of_state(value.roots):
        return None
    if recorder.frame.parent is not None:
        raise Unshareable("reads the contents of a parameter")
    held = _held(recorder, value)
    if held is None:
        return None
    graph, contents = held
    for name in contents.keys() - {f"{CONSTANT}.{name}" for name in recorder.constants}:
        recorder.buffers.setdefault(name, contents[name].detach().cpu().clone())
        recorder.read_buffers.setdefault(name, f"{source_line()} ({what})")
    with torch.no_grad():
        return evaluate(Predicate(graph, (), contents, torch.empty(0)), {}).cpu()


def made_of_state(recorder: Recorder, value: TracedValue) -> torch.Tensor | None:
    """Contents, however many, of what follows from weights, buffers and constants alone, now and with no guard."""
    held = _held(recorder, value) if of_state(value.roots) and recorder.frame.parent is None else None
    if held is None:
        return None
    with torch.no_grad():
        return evaluate(Predicate(held[0], (), held[1], torch.empty(0)), {}).cpu()


def of_state(roots: Roots) -> bool:
    """Whether nothing but the model's own tensors and constants is behind a value."""
    return all(root in (Origin.PARAMETER, Origin.CONSTANT) or isinstance(root, FromBuffer) for root in roots)


def _held(recorder: Recorder, value: TracedValue) -> tuple[fx.Graph, dict[str, torch.Tensor]] | None:
    """How a value follows from the model's own tensors, and those; None where one of them is not at hand."""
    graph, _ = _cone(recorder, recorder.node(value.fake))
    names = [str(node.target) for node in graph.nodes if node.op == "get_attr"]
    held = {f"{CONSTANT}.{name}": constant for name, constant in recorder.constants.items()}
    known = {**recorder.buffers, **recorder.weights, **held}
    contents = {name: known[name] for name in names if name in known}
    if len(contents) < len(names) or any(contents[name].numel() > KNOWN_NUMEL for name in names):
        return None
    return graph, contents


def _cone(recorder: Recorder, result: fx.Node) -> tuple[fx.Graph, tuple[str, ...]]:
    """A graph of the nodes that a node is computed from, and the paths of the inputs among them."""
    needed = {result}
    for node in reversed(list(recorder.frame.graph.nodes)):
        if node in needed:
            needed.update(node.all_input_nodes)
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    paths: list[str] = []
    inputs = dict(zip(recorder.frame.placeholders, recorder.inputs, strict=True))
    for node in recorder.frame.graph.nodes:
        if node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            paths += [inputs[node]] if node.op == "placeholder" else []
    graph.output(copies[result])
    return graph, tuple(paths)


def evaluate(predicate: Predicate, leaves: Mapping[str, Any]) -> torch.Tensor:
    """What a predicate's program gives for these inputs, where they are."""
    feed = [leaves[path] for path in predicate.paths]
    device = feed[0].device if feed else torch.device("cpu")
    given, env = iter(feed), dict[fx.Node, Any]()
    for node in predicate.graph.nodes:
        if node.op == "placeholder":
            env[node] = next(given)
        elif node.op == "get_attr":
            env[node] = predicate.constants[str(node.target)].to(device)
        elif node.op == "output":
            break
        else:
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), env.__getitem__)
            if kwargs.get("device") is not None:
                kwargs = {**kwargs, "device": device}
            target: Any = node.target
            env[node] = target(*args, **kwargs)
    result: torch.Tensor = env[node.args[0]]
    return result
