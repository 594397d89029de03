"""The arguments of one call of what is ported."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from xdit_ir.capture.inputs import bind_arguments
from xdit_ir.deferral.deferred import Deferred, materialize
from xdit_ir.errors import MismatchError


@dataclass(frozen=True, eq=False)
class Arguments:
    """Those of one call of forward."""

    args: Sequence[Any]
    kwargs: Mapping[str, Any]

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        """Those of the tensors that are arguments themselves."""
        return tuple(x.shape for x in (*self.args, *self.kwargs.values()) if isinstance(x, torch.Tensor))

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that are there, in lists and objects too."""
        return [x for x in self._leaves if isinstance(x, torch.Tensor)]

    @property
    def objects(self) -> list[Any]:
        """What is no tensor."""
        return [x for x in self._leaves if not isinstance(x, torch.Tensor)]

    @property
    def _leaves(self) -> list[Any]:
        return pytree.tree_leaves((self.args, self.kwargs))

    def example(self, signature: inspect.Signature) -> Any:
        """As `trace` takes them; what was put off is computed."""
        named = bind_arguments(signature, self.args, self.kwargs, MismatchError)
        example = tuple(self.args) if self.args and not self.kwargs else named
        return pytree.tree_map_only(Deferred, materialize, example)
