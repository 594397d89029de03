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

from xdit_ir.caching.region import COPIES, MOVES, ReusedRegion, aten, find_region, packet_of
from xdit_ir.caching.rule import CacheRule, Watched
from xdit_ir.errors import ParallelizeError, StateError
from xdit_ir.ir.program import Program, call_parts, is_block_call, where_of

_REGISTRY, _LIBRARY = "_diffusers_hook", "diffusers.hooks."
_STATE = ("_context", "_state_cache")  # what calls leave in what several hooks share
_MAGNITUDES, _ALONE = "MagCache", "inference"  # the second: what it calls a context that nobody has named
_CARRIES = MOVES | COPIES | {aten.cat}
# Of caches that mean no rule: their name, what they do, and the attribute of a hook that says how often.
_OTHERS = {
    "taylorseer_cache": ("TaylorSeerCache", "extrapolates what single layers gave in earlier steps", "cache_interval"),
    "pyramid_attention_broadcast": (
        "PyramidAttentionBroadcast",
        "reuses what single attentions gave in earlier steps",
        "block_skip_range",
    ),
    "faster_cache": (
        "FasterCache",
        "extrapolates what single attentions gave in earlier steps, and half of the batch",
        "block_skip_range",
    ),
    "sea_cache": ("SeaCache", "decides by spectra of the latents, and extrapolates what blocks added", ""),
    "text_kv_cache": ("TextKVCache", "keeps keys and values of the text, without a change of results", ""),
}


@dataclass(frozen=True)
class HookedCache:
    """One called `name`, which means `rule`; `blocks` have its hooks, in the order in which it expects them to run, and
    `states` is what the hooks share: a state for each branch of guidance, by the name of its context."""

    name: str
    rule: str
    blocks: tuple[str, ...]
    states: Any

    def branch(self) -> tuple[str, object]:
        """The name of the context that a call is made in, and its state, a new one for a new request: pipelines begin
        one by `_reset_stateful_cache`. As the hooks do it, which raise `ValueError` where a context is missing."""
        if self.name == _MAGNITUDES and self.states._context is None:
            kept = self.states._state_cache
            return _ALONE, kept.setdefault(_ALONE, self.states._state_cls())
        return str(self.states.context.name), self.states.get_state()

    def among(self, schedule: Mapping[str, Any], program: Program) -> dict[str, Any]:
        """The options of `parallelize` for an analysed program, with the rule.

        Raises:
            ParallelizeError: another rule is given.
            StateError: what the rule reuses of this program is not what the cache does.
        """
        if "cache" in schedule:
            raise ParallelizeError(
                f"cache={schedule['cache']!r}, and enable_cache has given the model a {self.name}; expected one of "
                "them, nearest legal: disable_cache()"
            )
        try:
            region = find_region(program, CacheRule.parse(self.rule).watched)
        except ParallelizeError as error:
            raise _refused(self.name, f"which has nothing to reuse here ({error})", "") from error
        if (why := _other_region(region, self)) is not None:
            raise _refused(self.name, why, self.rule)
        return {**schedule, "cache": self.rule}


def hooked_cache(model: nn.Module) -> HookedCache | None:
    """The step cache in a model's hooks.

    Raises:
        StateError: it means no rule; names the nearest one.
    """
    kinds: dict[str, dict[str, list[Any]]] = {}
    for path, module in model.named_modules():
        for kind, hook in _caches_of(module):
            kinds.setdefault(kind, {}).setdefault(path, []).append(hook)
    if not kinds:
        return None
    (kind, places), *more = kinds.items()
    if more:
        raise _refused(" and ".join(sorted(kinds)), "of which one would see what the other leaves out", "")
    hooks = [hook for found in places.values() for hook in found]
    if kind in _OTHERS:
        name, what, interval = _OTHERS[kind]
        often = next((getattr(hook, interval) for hook in hooks if hasattr(hook, interval)), 0)
        raise _refused(name, f"which {what}", f"every:{often}" if often > 1 else "first-block:0.08")
    rule = _first_block(hooks) if kind == "first_block_cache" else _magnitudes(hooks)
    name = "FirstBlockCache" if kind == "first_block_cache" else _MAGNITUDES
    return HookedCache(name, rule, tuple(places), next(_shared(hooks)))


@contextmanager
def caches_away(model: nn.Module) -> Iterator[None]:
    """A model whose blocks are as they were before step caches were hooked into them, for as long as it is traced."""
    held = [(vars(module), dict(vars(module))) for module in model.modules() if any(_caches_of(module))]
    try:
        for module in [module for module in model.modules() if any(_caches_of(module))]:
            registry = vars(module).pop(_REGISTRY)
            first = registry._fn_refs[0].original_forward
            del module.forward
            if not _is_own(first, module):
                module.forward = first
        yield
    finally:
        for now, before in held:
            found = now | {key: before[key] for key in (_REGISTRY, "forward")}
            order = dict.fromkeys([*before, *found])
            now.clear()
            now.update({key: found[key] for key in order if key in found})


def check_unhooked(model: nn.Module) -> None:
    """Raise `StateError` for a model with a step cache, which a program alone knows nothing of."""
    if (found := hooked_cache(model)) is not None:
        raise StateError(
            f"enable_cache has given the model a {found.name}, which `trace` cannot take over; use `port`, which does, "
            f"or parallelize(cache={found.rule!r}) after disable_cache()"
        )


def states_of(model: nn.Module) -> set[tuple[int, str]]:
    """What calls leave in the hooks of step caches, as keys of dicts that are told by their ids."""
    hooks = [hook for module in model.modules() for _, hook in _caches_of(module)]
    return {(id(vars(item)), name) for item in _shared(hooks) for name in _STATE}


def _shared(hooks: Iterable[Any]) -> Iterator[Any]:
    """What hooks share that keeps states."""
    yield from {id(item): item for hook in hooks for item in vars(hook).values() if hasattr(item, _STATE[1])}.values()


def _caches_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    registry: Any = vars(module).get(_REGISTRY)
    hooks = list(getattr(registry, "hooks", {}).values())
    known = {"first_block_cache", "mag_cache", *_OTHERS}
    kinds = [type(hook).__module__.removeprefix(_LIBRARY) for hook in hooks]
    found = [(kind, hook) for kind, hook in zip(kinds, hooks, strict=True) if kind in known]
    if found and len(found) < len(hooks):
        raise _refused(found[0][0], f"beside other hooks of one module ({', '.join(registry.hooks)})", "")
    yield from found


def _is_own(forward: Any, module: nn.Module) -> bool:
    return isinstance(forward, types.MethodType) and forward.__func__ is type(module).forward


def _first_block(hooks: Sequence[Any]) -> str:
    [threshold] = {hook.threshold for hook in hooks if hasattr(hook, "threshold")}
    if threshold <= 0:
        raise _refused("FirstBlockCache", f"whose threshold {threshold} leaves no block out", "")
    return f"{Watched.FIRST_BLOCK.value}:{float(threshold)}"


def _magnitudes(hooks: Sequence[Any]) -> str:
    config = hooks[0].config
    if config.calibrate:
        raise _refused("MagCache", "which looks at what blocks add (calibrate=True)", "")
    steps = ",".join(map(str, _computed_by_magnitudes(config)))
    return f"steps:{steps}/{config.num_inference_steps}"


def _computed_by_magnitudes(config: Any) -> list[int]:
    """Steps are reused while what blocks add has changed by little, says a table, since it was computed last."""
    begin = int(config.retention_ratio * config.num_inference_steps + 0.5)
    ratio, error, reused, computed = 1.0, 0.0, 0, list[int]()
    for step in range(config.num_inference_steps):
        if step >= begin:
            ratio = ratio * config.mag_ratios[step]  # of its dtype, whose rounding may tip a decision
            error, reused = error + abs(1.0 - ratio), reused + 1
            if computed and error <= config.threshold and reused <= config.max_skip_steps:
                continue
            ratio, error, reused = 1.0, 0.0, 0
        computed.append(step)
    return computed


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


def _ends(paths: Iterable[str]) -> str:
    first, *more = paths
    return f"{first} to {more[-1]} ({len(more) + 1} blocks)" if more else first


def _refused(name: str, why: str, nearest: str) -> StateError:
    instead = f"port(..., cache={nearest!r}) after disable_cache()" if nearest else "disable_cache()"
    return StateError(
        f"enable_cache has given the model a {name}, {why}: a parallel program does not; nearest: {instead}"
    )
