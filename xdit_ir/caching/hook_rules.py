"""What the hooks of diffusers' step caches mean, as rules of ours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from xdit_ir.caching.kept import Blank, Latest, PastValue, Taylor, Trend
from xdit_ir.caching.rule import CacheRule, Group, Watched
from xdit_ir.errors import StateError

MAGNITUDES, _INTERVAL = "MagCache", "block_skip_range"
_NAMES = {
    "first_block_cache": "FirstBlockCache",
    "mag_cache": MAGNITUDES,
    "taylorseer_cache": "TaylorSeerCache",
    "pyramid_attention_broadcast": "PyramidAttentionBroadcast",
    "faster_cache": "FasterCache",
}
# Of caches that mean no rule: their name, and what they do.
_OTHERS = {
    "sea_cache": ("SeaCache", "decides by spectra of the latents, and extrapolates what blocks added"),
    "text_kv_cache": ("TextKVCache", "keeps keys and values of the text, without a change of results"),
}
KINDS = frozenset({*_NAMES, *_OTHERS})  # the library's modules that hooks of caches come from


@dataclass(frozen=True)
class Meaning:
    """A cache called `name` means `rule`; where that has groups, they are those of the modules by path in `groups`."""

    name: str
    rule: CacheRule
    groups: Mapping[str, int] = field(default_factory=dict)


def meaning_of(kind: str, hooks: Mapping[str, Sequence[Any]], model: nn.Module) -> Meaning:
    """That of a cache's hooks by the paths of their modules in a model.

    Raises:
        StateError: it means no rule; names the nearest one.
    """
    if kind in _OTHERS:
        name, what = _OTHERS[kind]
        raise refused(name, f"which {what}", "first-block:0.08")
    name, everyone = _NAMES[kind], [hook for found in hooks.values() for hook in found]
    if kind == "first_block_cache":
        return Meaning(name, CacheRule.parse(_first_block(everyone)))
    if kind == "mag_cache":
        return Meaning(name, CacheRule.parse(_magnitudes(everyone)))
    if kind == "taylorseer_cache":
        return _of_modules(name, {path: _taylor(hook) for path, [hook] in hooks.items()}, branchless=False)
    if kind == "pyramid_attention_broadcast":
        return _of_modules(name, {path: _broadcast(hook) for path, [hook] in hooks.items()}, branchless=True)
    blocks = {path: hook for path, [hook] in hooks.items() if hasattr(hook, _INTERVAL)}  # without the denoiser's
    if not all(hook.is_guidance_distilled for hook in everyone):
        often = next((getattr(hook, _INTERVAL) for hook in blocks.values()), 2)
        raise refused(name, "which makes up half of the batch out of the other half's spectrum", f"every:{often}")
    groups = {path: _trend(hook, model.get_submodule(path)) for path, hook in blocks.items()}
    return _of_modules(name, groups, branchless=True)


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
    """The calls that Pyramid Attention Broadcast and FasterCache leave out, inside a range of timesteps."""

    interval: int
    timesteps: tuple[float, float]
    timestep: Callable[[], float]

    def __call__(self, step: int) -> bool:
        return step % self.interval > 0 and bool(self.timesteps[0] < self.timestep() < self.timesteps[1])

    def __str__(self) -> str:
        return f"computed in 1 of {self.interval} calls where {self.timesteps[0]} < timestep < {self.timesteps[1]}"


@dataclass(frozen=True)
class _Same:
    """What is kept of modules that are reused as they were."""

    def __call__(self) -> PastValue:
        return Latest()

    def __str__(self) -> str:
        return "as they were"


@dataclass(frozen=True)
class _Series:
    """What is kept of modules that TaylorSeer predicts; nobody is to look at those without an `order`."""

    order: int | None
    dtype: torch.dtype | None

    def __call__(self) -> PastValue:
        return Blank() if self.order is None else Taylor(self.order, self.dtype)

    def __str__(self) -> str:
        return "left out" if self.order is None else f"order {self.order} in {self.dtype}"


@dataclass(frozen=True)
class _Trend:
    """What is kept of a module that FasterCache extrapolates, by a weight that it asks for each time."""

    weight: Callable[[nn.Module], float]
    module: nn.Module

    def __call__(self) -> PastValue:
        return Trend(lambda: self.weight(self.module))

    def __str__(self) -> str:
        return "on a line"


def _of_modules(name: str, places: Mapping[str, Group], *, branchless: bool) -> Meaning:
    """That of hooks on single modules."""
    if not places:
        raise refused(name, "which is on no module of the model", "")
    for path in places:
        if inner := next((other for other in places if other.startswith(f"{path}.")), None):
            raise refused(name, f"whose hook on {inner} does not see the steps that leave {path} out", "")
    groups = list(dict.fromkeys(places.values()))
    said = Counter(f"{group.reused}, {group.history}" for group in places.values())
    text = f"{name}: {'; '.join(f'{count} modules {how}' for how, count in said.items())}"
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
    return Group(_Broadcast(hook.block_skip_range, (low, high), hook.current_timestep_callback), _Same())


def _trend(hook: Any, module: nn.Module) -> Group:
    return Group(_broadcast(hook).reused, _Trend(hook.weight_callback, module))


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
