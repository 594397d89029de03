"""Hooks of all modules (`register_module_forward_hook`), and which of them are PyTorch's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch.nn.modules import module as global_hooks

from xdit_ir.reflection.looked_into import is_library
from xdit_ir.reflection.parts import Part

GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")


def foreign_hooks(name: str) -> dict[int, Any]:
    """Those of the global hooks of modules that are not PyTorch's own, as its counters of FLOPs have them."""
    hooks: dict[int, Any] = getattr(global_hooks, name)
    return {key: hook for key, hook in hooks.items() if not is_library(getattr(hook, "__module__", ""))}


class GlobalHooks(Part):
    """Of the global hooks of a name (`item`), those that are not PyTorch's own."""

    def read(self) -> Mapping[Any, Any]:
        return foreign_hooks(self.item)

    def put(self, held: Mapping[Any, Any]) -> None:
        hooks = getattr(global_hooks, self.item)
        for key in foreign_hooks(self.item):
            del hooks[key]
        hooks.update(held)


@contextmanager
def watchers_away() -> Iterator[None]:
    """Without PyTorch's own global hooks of modules, which would see a trace's copies of them."""
    before = {name: dict(getattr(global_hooks, name)) for name in GLOBAL_HOOKS}
    try:
        for name in GLOBAL_HOOKS:
            kept = foreign_hooks(name)
            getattr(global_hooks, name).clear()
            getattr(global_hooks, name).update(kept)
        yield
    finally:
        for name, hooks in before.items():
            getattr(global_hooks, name).clear()
            getattr(global_hooks, name).update(hooks)
