"""Passes by name, their options, and lists of them as text: `find-tokens,shard-tokens{ulysses=2},lower-attention`.

An option is a field of the pass's dataclass. A mesh is given by its degrees, a machine by its speeds. A pass that wants
a mesh and is given no degree gets that of the pass before it, or else of the program; speeds that it is not given are
those of the pass before it too.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from xdit_ir.errors import XditError
from xdit_ir.ir.facts import Fact
from xdit_ir.ir.mesh import MESH_DIMS, Mesh
from xdit_ir.ir.program import Program
from xdit_ir.passes.base import After, run_passes
from xdit_ir.passes.contract import Pass, contract_of
from xdit_ir.passes.order import PASSES
from xdit_ir.sharding.machine import H100, SPEEDS, Machine


@dataclass(frozen=True)
class Described:
    """A pass for people: what it does, whether results stay bit-equal, its options with their defaults, and the facts
    that it requires and provides."""

    name: str
    does: str
    numerics: str
    options: Mapping[str, str]
    requires: tuple[str, ...] = ()
    provides: tuple[str, ...] = ()


def describe(kind: type[Any]) -> Described:
    """The description of a pass, from its docstring, its fields and what it declares."""
    contract = contract_of(kind)
    requires, provides = (
        tuple(fact.value for fact in Fact if fact in facts) for facts in (contract.requires, contract.provides)
    )
    options = {name: _shown(default) for name, _, default in _options(kind)}
    does = re.sub(r"\s+", " ", kind.__doc__ or "").strip()
    return Described(kind.name, does, contract.numerics, options, requires, provides)


def _shown(default: Any) -> str:
    return "required" if default is dataclasses.MISSING else "of the pass before" if default is Mesh else repr(default)


def _options(kind: type[Any]) -> Iterator[tuple[str, tuple[str, Any], Any]]:
    """The options of a pass: name, the field with its type, and the default (`Mesh`: that of the program)."""
    hints = typing.get_type_hints(kind)
    for one in dataclasses.fields(kind):
        hint = hints[one.name]
        if one.name == "name" or not one.repr:
            continue
        if hint is Mesh:
            yield from ((dim, (one.name, Mesh), Mesh) for dim in MESH_DIMS)
        elif hint is Machine:
            yield from ((name, (one.name, Machine), default) for name, default in SPEEDS.items())
        else:
            made = one.default_factory() if one.default_factory is not dataclasses.MISSING else one.default
            yield one.name, (one.name, hint), made


@dataclass(frozen=True)
class PassSpec:
    """A pass of a list, with the options that it is given."""

    kind: type[Any]
    options: Mapping[str, str] = field(default_factory=dict)

    def make(self, mesh: Mesh | None = None, machine: Machine = H100) -> Pass:
        """The pass, with this mesh if it wants one and is given no degree, and these speeds where it is given none.

        Raises:
            XditError: it has no such option, or the option no such value.
        """
        known = {name: where for name, where, _ in _options(self.kind)}
        grouped: dict[str, dict[str, Any]] = {}
        values: dict[str, Any] = {}
        for name, text in self.options.items():
            if name not in known:
                raise XditError(_no_such("option", name, known, f"pass {self.kind.name}"))
            place, hint = known[name]
            if hint in (Mesh, Machine):
                grouped.setdefault(place, {})[name] = _value(name, text, int if hint is Mesh else float)
            else:
                values[place] = _value(name, text, hint)
        for place, hint in dict.fromkeys(known.values()):
            if hint is Mesh:
                values[place] = Mesh.of(**grouped[place]) if place in grouped else self._wanted(mesh)
            elif hint is Machine:
                values[place] = dataclasses.replace(machine, **grouped.get(place, {}))
        try:
            return typing.cast(Pass, self.kind(**values))
        except TypeError as error:
            raise XditError(f"pass {self.kind.name}: {error}") from None

    def _wanted(self, mesh: Mesh | None) -> Mesh:
        if mesh is None:
            raise XditError(
                f"pass {self.kind.name} needs a mesh, and neither a pass before it nor the program has one; "
                f"give degrees, such as {self.kind.name}{{ulysses=2}}"
            )
        return mesh


def _value(name: str, text: str, hint: Any) -> Any:
    try:
        if hint in (int, float):
            return hint(text)
        if hint is bool:
            return {"true": True, "false": False}[text.lower()]
        if hint is str:
            return text
        return tuple(int(part) for part in re.split(r"[+:/.]", text))
    except (ValueError, KeyError):
        wanted = getattr(hint, "__name__", "numbers joined by +")
        raise XditError(f"option {name}={text}: expected {wanted}, such as {name}=2") from None


def _no_such(what: str, name: str, known: Sequence[str] | Mapping[str, Any], where: str) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{where} has no {what} {name!r}{hint} There are: {', '.join(known) or 'none'}"


def parse_passes(text: str) -> list[PassSpec]:
    """The passes that `text` lists; `package.module:Class` names one that is not ours.

    Raises:
        XditError: there is no such pass or class, or the list is not well formed.
    """
    steps, rest = [], text.strip()
    while rest:
        found = re.match(r"\s*([\w.:\-]+)\s*(?:\{([^{}]*)\})?\s*(?:,|$)", rest)
        if found is None:
            raise XditError(f"expected a list such as find-tokens,shard-tokens{{ulysses=2}}, got {rest!r}")
        steps.append(PassSpec(_kind(found[1]), _given(found[2] or "", found[1])))
        rest = rest[found.end() :]
    return steps


def _given(text: str, name: str) -> dict[str, str]:
    given = {}
    for item in re.split(r"[\s,]+", text.strip()) if text.strip() else ():
        key, equals, value = item.partition("=")
        if not equals or not value:
            raise XditError(f"pass {name}: expected option=value, got {item!r}")
        given[key] = value
    return given


def _kind(name: str) -> type[Any]:
    known = {kind.name: kind for kind in PASSES}
    if name in known:
        return known[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise XditError(_no_such("pass", name, known, "xdit-ir"))
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ImportError as error:
        raise XditError(f"pass {name}: {error}") from None
    if not dataclasses.is_dataclass(found) or not isinstance(found, type) or not hasattr(found, "apply"):
        raise XditError(f"{name} is no pass: a dataclass with a field `name` and a method `apply`")
    return found


def apply_passes(program: Program, steps: Sequence[PassSpec], after: After | None = None) -> Program:
    """Run the passes in order, with the verifier behind each.

    Raises:
        XditError: a pass has no such option, or cannot run yet: see `run_passes`.
    """
    mesh, machine = program.seeding.mesh if program.seeding is not None else program.mesh, H100
    for step in steps:
        made = step.make(mesh, machine)
        mesh, machine = getattr(made, "mesh", mesh), getattr(made, "machine", machine)
        program = run_passes(program, [made], after)
    return program
