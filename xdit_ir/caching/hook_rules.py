"""What the hooks of diffusers' step caches mean, as rules of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from xdit_ir.caching.history import Blank, History, Latest, Taylor
from xdit_ir.caching.rule import CacheRule, Group, Watched
from xdit_ir.errors import StateError

MAGNITUDES = "MagCache"
_NAMES = {
    "first_block_cache": "FirstBlockCache",
    "mag_cache": MAGNITUDES,
    "taylorseer_cache": "TaylorSeerCache",
    "pyramid_attention_broadcast": "PyramidAttentionBroadcast",
}
# Of caches that mean no rule: their name, what they do, and the attribute of a hook that says how often.
_OTHERS = {
    "faster_cache": (
        "FasterCache",
        "extrapolates what single attentions gave in earlier steps, and half of the batch",
        "block_skip_range",
    ),
    "sea_cache": ("SeaCache", "decides by spectra of the latents, and extrapolates what blocks added", ""),
    "text_kv_cache": ("TextKVCache", "keeps keys and values of the text, without a change of results", ""),
}
KINDS = frozenset({*_NAMES, *_OTHERS})  # the library's modules that hooks of caches come from


@dataclass(frozen=True)
class Meaning:
    """A cache called `name` means `rule`; where that has groups, they are those of the modules by path in `groups`."""

    name: str
    rule: CacheRule
    groups: Mapping[str, int] = field(default_factory=dict)


def meaning_of(kind: str, hooks: Mapping[str, Sequence[Any]]) -> Meaning:
    """That of a cache's hooks by the paths of their modules.

    Raises:
        StateError: it means no rule; names the nearest one.
    """
    everyone = [hook for found in hooks.values() for hook in found]
    if kind in _OTHERS:
        name, what, interval = _OTHERS[kind]
        often = next((getattr(hook, interval) for hook in everyone if hasattr(hook, interval)), 0)
        raise refused(name, f"which {what}", f"every:{often}" if often > 1 else "first-block:0.08")
    name = _NAMES[kind]
    if kind == "first_block_cache":
        return Meaning(name, CacheRule.parse(_first_block(everyone)))
    if kind == "mag_cache":
        return Meaning(name, CacheRule.parse(_magnitudes(everyone)))
    read = _taylor if kind == "taylorseer_cache" else _broadcast
    return _of_modules(name, {path: read(hook) for path, [hook] in hooks.items()}, branchless=read is _broadcast)


def refused(name: str, why: str, nearest: str) -> StateError:
    """The error for a cache that a parallel program cannot take over."""
    instead = f"port(..., cache={nearest!r}) after disable_cache()" if nearest else "disable_cache()"
    return StateError(
        f"enable_cache has given the model a {name}, {why}: a parallel program does not; nearest: {instead}"
    )


@dataclass(frozen=True)
class _Predicted:
    """The steps that TaylorSeer predicts."""

    interval: int
    before: int
    after: int | None

    def __call__(self, step: int) -> bool:
        computed = step < self.before or (step - self.before - 1) % self.interval == 0
        return not computed and (self.after is None or step < self.after)

    def __str__(self) -> str:
        end = "" if self.after is None else f", all from {self.after} on"
        return f"computed in steps before {self.before}, then in 1 of {self.interval}{end}"


@dataclass(frozen=True)
class _Broadcast:
    """The calls that Pyramid Attention Broadcast leaves out, inside a range of timesteps."""

    interval: int
    timesteps: tuple[float, float]
    timestep: Callable[[], float]

    def __call__(self, step: int) -> bool:
        return step % self.interval > 0 and bool(self.timesteps[0] < self.timestep() < self.timesteps[1])

    def __str__(self) -> str:
        return f"computed in 1 of {self.interval} calls where {self.timesteps[0]} < timestep < {self.timesteps[1]}"


@dataclass(frozen=True)
class _Series:
    """What is kept of modules that TaylorSeer predicts; nobody is to look at those without an `order`."""

    order: int | None
    dtype: torch.dtype | None

    def __call__(self) -> History:
        return Blank() if self.order is None else Taylor(self.order, self.dtype)

    def __str__(self) -> str:
        return "left out" if self.order is None else f"order {self.order} in {self.dtype}"


def _of_modules(name: str, places: Mapping[str, Group], *, branchless: bool) -> Meaning:
    """That of hooks on single modules."""
    for path in places:
        if inner := next((other for other in places if other.startswith(f"{path}.")), None):
            raise refused(name, f"whose hook on {inner} does not see the steps that leave {path} out", "")
    groups = list(dict.fromkeys(places.values()))
    said = (f"{list(places.values()).count(group)} modules {group.reused}" for group in groups)
    kept = (f" ({group.history})" if isinstance(group.history, _Series) else "" for group in groups)
    text = f"{name}: {'; '.join(map(''.join, zip(said, kept, strict=True)))}"
    rule = CacheRule(text, Watched.NOTHING, groups=tuple(groups), branchless=branchless)
    return Meaning(name, rule, {path: groups.index(group) for path, group in places.items()})


def _taylor(hook: Any) -> Group:
    predicted = _Predicted(hook.cache_interval, hook.disable_cache_before_step, hook.disable_cache_after_step)
    if predicted(0):
        raise refused("TaylorSeerCache", "which predicts before it has computed (disable_cache_before_step=0)", "")
    made = hook.state_manager._init_kwargs
    order = None if made["is_inactive"] else int(made["max_order"])
    return Group(predicted, _Series(order, made["taylor_factors_dtype"]))


def _broadcast(hook: Any) -> Group:
    low, high = hook.timestep_skip_range
    return Group(_Broadcast(hook.block_skip_range, (low, high), hook.current_timestep_callback), Latest)


def _first_block(hooks: Sequence[Any]) -> str:
    [threshold] = {hook.threshold for hook in hooks if hasattr(hook, "threshold")}
    if threshold <= 0:
        raise refused("FirstBlockCache", f"whose threshold {threshold} leaves no block out", "")
    return f"{Watched.FIRST_BLOCK.value}:{float(threshold)}"


def _magnitudes(hooks: Sequence[Any]) -> str:
    config = hooks[0].config
    if config.calibrate:
        raise refused(MAGNITUDES, "which looks at what blocks add (calibrate=True)", "")
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
