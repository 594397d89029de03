"""Step caches that diffusers has hooked into a model's blocks (`enable_cache`), as rules of ours where they mean one.

They are told by the library's registry of hooks and by its module that a hook comes from, whatever the model is. Their
hooks stay where they are, so that they can be asked for and removed, and are not called by a parallel program.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from xdit_ir.caching.hook_rules import KINDS, MAGNITUDES, Meaning, meaning_of, refused
from xdit_ir.caching.region import COPIES, MOVES, ReusedRegion, aten, find_region, packet_of
from xdit_ir.caching.rule import CacheRule
from xdit_ir.errors import ParallelizeError, StateError
from xdit_ir.ir import ops
from xdit_ir.ir.program import Program, call_parts, called_block, is_block_call, where_of
from xdit_ir.reflection.tree import modules_of, named_modules_of

_REGISTRY, _LIBRARY = "_diffusers_hook", "diffusers.hooks."
_STATE = ("_context", "_state_cache")  # what calls leave in what several hooks share
_ALONE = "inference"  # what MagCache calls a context that nobody has named
_ASKED, _LISTED, _CONFIG = "_callback", "_child_registries_cache", "_cache_config"
_CALL, _CARRIES = "call_function", MOVES | COPIES | {aten.cat}


class _Request:
    """One that a hook without contexts has begun."""


class _Beginning(int):
    """The number of a request's first call in the state of such a hook: there until the state is reset for another one,
    as its own forward, which counts on, does not run. Means the same to it."""

    def __init__(self, number: int) -> None:
        self.request = _Request()


@dataclass(frozen=True)
class HookedCache:
    """What it means; `blocks` have its hooks, in the order in which it expects them to run, and `states` is what the
    hooks share: a state for each branch of guidance, by the name of its context. Of hooks that know no contexts it is
    the state of the first."""

    meaning: Meaning
    blocks: tuple[str, ...]
    states: Any

    @property
    def rule(self) -> CacheRule:
        """That of what is reused."""
        return self.meaning.rule

    def branch(self) -> tuple[str, object]:
        """The name of the context that a call is made in, and its state, a new one for a new request: pipelines begin
        one by `_reset_stateful_cache`. As the hooks do it, which raise `ValueError` where a context is missing."""
        if self.rule.branchless:
            if not isinstance(self.states.iteration, _Beginning):
                self.states.iteration = _Beginning(0)
            return "", self.states.iteration.request
        if self.meaning.name == MAGNITUDES and self.states._context is None:
            kept = self.states._state_cache
            return _ALONE, kept.setdefault(_ALONE, self.states._state_cls())
        return str(self.states.context.name), self.states.get_state()

    def among(self, schedule: Mapping[str, Any], program: Program) -> dict[str, Any]:
        """The options of `parallelize` for an analysed program, with the rule.

        Raises:
            ParallelizeError: another rule is given.
            StateError: what the rule reuses of this program is not what the cache does.
        """
        name = self.meaning.name
        if "cache" in schedule:
            raise ParallelizeError(
                f"cache={schedule['cache']!r}, and enable_cache has given the model a {name}; expected one of "
                "them, nearest legal: disable_cache()"
            )
        if self.rule.groups:
            _check_calls(name, program)
            return {**schedule, "cache": self.rule}
        try:
            region = find_region(program, self.rule.watched)
        except ParallelizeError as error:
            raise refused(name, f"which has nothing to reuse here ({error})", "") from error
        if (why := _other_region(region, self)) is not None:
            raise refused(name, why, self.rule.text)
        return {**schedule, "cache": self.rule}


def hooked_cache(model: nn.Module) -> HookedCache | None:
    """The step cache in a model's hooks.

    Raises:
        StateError: it means no rule; names the nearest one.
    """
    kinds: dict[str, dict[str, list[Any]]] = {}
    for path, module in named_modules_of(model):
        for kind, hook in _caches_of(module):
            kinds.setdefault(kind, {}).setdefault(path, []).append(hook)
    if not kinds:
        return None
    (kind, places), *more = kinds.items()
    if more:
        raise refused(" and ".join(sorted(kinds)), "of which one would see what the other leaves out", "")
    meaning, hooks = meaning_of(kind, places, model), [hook for found in places.values() for hook in found]
    single = [places[path][0] for path in meaning.groups]
    states = single[0].state if meaning.rule.branchless else next(_shared(hooks))
    return HookedCache(meaning, tuple(places), states)


@contextmanager
def caches_away(model: nn.Module) -> Iterator[None]:
    """A model whose blocks are as they were before step caches were hooked into them, for as long as it is traced."""
    modules = modules_of(model)
    hooked = [module for module in modules if _caches_of(module)]
    held = [(vars(module), dict(vars(module))) for module in hooked]
    registries = [vars(vars(module)[_REGISTRY]) for module in modules if _REGISTRY in vars(module)]
    places = [(vars(module), _CONFIG) for module in modules] + [(one, _LISTED) for one in registries]
    leading = [(place, name, place[name]) for place, name in places if name in place]  # to the hooks and who they ask
    try:
        for place, name, _ in leading:
            place[name] = None
        for module in hooked:
            registry = vars(module).pop(_REGISTRY)
            first = registry._fn_refs[0].original_forward
            del module.forward
            if not _is_own(first, module):
                module.forward = first
        yield
    finally:
        for place, name, item in leading:
            place[name] = item
        for now, before in held:
            found = now | {key: before[key] for key in (_REGISTRY, "forward")}
            order = dict.fromkeys([*before, *found])
            now.clear()
            now.update({key: found[key] for key in order if key in found})


def check_unhooked(model: nn.Module) -> None:
    """Raise `StateError` for a model with a step cache, which a program alone knows nothing of."""
    if (found := hooked_cache(model)) is not None:
        rule = "" if found.rule.groups else f", or parallelize(cache={found.rule.text!r}) after disable_cache()"
        raise StateError(
            f"enable_cache has given the model a {found.meaning.name}, which `trace` cannot take over; use `port`, "
            f"which does{rule}"
        )


def states_of(model: nn.Module) -> set[tuple[int, str]]:
    """What calls leave in the hooks of step caches, and what these ask in every call, as keys of dicts that are told by
    their ids; and the model's own registry while it has no hooks, which pipelines make when they end: a hook comes with
    a forward on the instance."""
    modules = modules_of(model)
    hooks = [hook for module in modules for _, hook in _caches_of(module)]
    states = [hook.state for hook in hooks if hasattr(hook, "state")]
    configs = [vars(module).get(_CONFIG) for module in modules]
    return {
        *([] if _hooks_of(model) else [(id(vars(model)), _REGISTRY)]),
        *((id(vars(item)), name) for item in _shared(hooks) for name in _STATE),
        *((id(vars(state)), name) for state in states for name in vars(state)),
        *((id(vars(one)), name) for one in (*hooks, *configs) if one for name in vars(one) if name.endswith(_ASKED)),
    }


def _shared(hooks: Iterable[Any]) -> Iterator[Any]:
    """What hooks share that keeps states."""
    yield from {id(item): item for hook in hooks for item in vars(hook).values() if hasattr(item, _STATE[1])}.values()


def _caches_of(module: nn.Module) -> Sequence[tuple[str, Any]]:
    if not (registered := _hooks_of(module)):  # as of most modules
        return ()
    hooks = list(registered.values())
    kinds = [type(hook).__module__.removeprefix(_LIBRARY) for hook in hooks]
    found = [(kind, hook) for kind, hook in zip(kinds, hooks, strict=True) if kind in KINDS]
    if found and len(found) < len(hooks):
        raise refused(found[0][0], f"beside other hooks of one module ({', '.join(registered)})", "")
    return found


def _hooks_of(module: nn.Module) -> Mapping[str, Any]:
    """All of the library's, by name."""
    return getattr(vars(module).get(_REGISTRY), "hooks", {})


def _is_own(forward: Any, module: nn.Module) -> bool:
    return isinstance(forward, types.MethodType) and forward.__func__ is type(module).forward


def _other_region(region: ReusedRegion, cache: HookedCache) -> str | None:
    """Why a step that reuses a region of ours would not be one that reuses what the cache does."""
    paths = [call_parts(call).prefix for call in region.calls]
    if paths != list(cache.blocks):
        return f"whose hooks are on {_ends(cache.blocks)}, while what works on the latents is {_ends(paths)}"
    for node in region.inside:
        if not is_block_call(node) and packet_of(node) not in _CARRIES:
            where = where_of(node)
            return f"which does again what stands between blocks ({node.target} in {where.module} {where.source})"
    if any(stream is None or not _only_from(node, region) for node, stream in region.results.items()):
        return "which gives the rest of the model what blocks give, not what they add"
    if len(region.watched) > 1:
        return f"which looks at one of {len(region.watched)} streams"
    if not region.watched and len(region.results) > 1:
        return "which keeps one of several results"
    return None


def _only_from(node: fx.Node, region: ReusedRegion) -> bool:
    """Whether a result is the last block's."""
    todo, seen = [node], set[fx.Node]()
    while todo:
        one = todo.pop()
        if one in seen or one is region.calls[-1]:
            continue
        if is_block_call(one):
            return False
        seen.add(one)
        todo += one.all_input_nodes
    return True


def _check_calls(name: str, program: Program) -> None:
    """Raise `StateError` where one module with a hook is called more than once, by calls of its block."""
    marked = {name for name, block in program.blocks.items() if block.graph.find_nodes(op=_CALL, target=ops.reuse)}
    paths = [call_parts(call).prefix for call in program.calls if called_block(call) in marked]
    if twice := next((path for path in paths if paths.count(path) > 1), ""):
        raise refused(name, f"which counts steps by calls of {twice}, of which there are {paths.count(twice)}", "")


def _ends(paths: Iterable[str]) -> str:
    first, *more = paths
    return f"{first} to {more[-1]} ({len(more) + 1} blocks)" if more else first
