"""A structure with arguments in the place of those numbers that other shapes have otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from xdit_ir.emission.lifting import Lifted
from xdit_ir.emission.structure import Structure, map_numbers, sizes_of
from xdit_ir.ir.graphs import placeholders


@dataclass(frozen=True)
class Template:
    """What the numbers of a structure may be: each is fixed, or an argument, which is called by the place of the number
    where it stands first (-1: none)."""

    fixed: tuple[int | None, ...]
    arguments: tuple[int, ...]

    @staticmethod
    def of(numbers: Sequence[int], lifted: Lifted) -> Template:
        """That in which equal symbols are one argument."""
        first: dict[Any, int] = {}
        arguments = tuple(
            -1 if isinstance(one, int) else first.setdefault(one, place) for place, one in enumerate(lifted)
        )
        fixed = tuple(None if at >= 0 else number for at, number in zip(arguments, numbers, strict=True))
        return Template(fixed, arguments)

    def fits(self, numbers: Sequence[int]) -> bool:
        """Whether these are such numbers; 0 and 1, for which compilers write other code, are never arguments."""
        return all(
            number == fixed if fixed is not None else number > 1 and number == numbers[at]
            for number, fixed, at in zip(numbers, self.fixed, self.arguments, strict=True)
        )

    @property
    def distinct(self) -> list[int]:
        """The arguments, each once."""
        return sorted(set(self.arguments) - {-1})


class ArgumentGraph:
    """The graph of a structure with arguments: sizes of what it takes, and of empty tensors that it takes behind these.

    `carried` are the arguments of those; `dynamic` has the dimensions which are arguments, by place of a placeholder.
    """

    def __init__(self, structure: Structure, template: Template) -> None:
        self.graph, self.dynamic, self._template = fx.Graph(), dict[int, list[int]](), template
        self._count = 0
        env, where = dict[fx.Node, fx.Node](), dict[int, tuple[fx.Node, int]]()
        for place, node in enumerate(placeholders(structure.graph)):
            env[node] = self.graph.placeholder(str(node.target))
            for dim, argument in enumerate(self._next(len(sizes_of(node)))):
                if argument is not None:
                    self.dynamic.setdefault(place, []).append(dim)
                    where.setdefault(argument, (env[node], dim))
        self.carried = [argument for argument in template.distinct if argument not in where]
        for place, argument in enumerate(self.carried, len(env)):
            self.dynamic[place] = [0]
            where[argument] = (self.graph.placeholder(f"size_{argument}"), 0)
        self._sizes = {argument: self.graph.call_method("size", at) for argument, at in where.items()}
        for node in structure.graph.nodes:
            if node.op != "placeholder":
                env[node] = self._copied(node, env)

    def _next(self, count: int) -> Sequence[int | None]:
        """The arguments that the next numbers are; None for those that are fixed."""
        found = self._template.arguments[self._count : self._count + count]
        self._count += count
        return [None if one < 0 else one for one in found]

    def _copied(self, node: fx.Node, env: dict[fx.Node, fx.Node]) -> fx.Node:
        def number(value: int) -> Any:
            [argument] = self._next(1)
            return value if argument is None else self._sizes[argument]

        args, kwargs = map_numbers((node.args, node.kwargs), number)
        args, kwargs = fx.map_arg((args, kwargs), lambda one: env.get(one, one))
        return self.graph.create_node(node.op, node.target, args, kwargs, node.name)
