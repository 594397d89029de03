"""How the compiler is called for a body: what differs from its defaults where sizes are symbols."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch.torch_version import TorchVersion

# To keep what operators give for symbols takes longer than to ask again.
_SETTINGS = {"fake_tensor_cache_enabled": False}


@contextmanager
def tracing(**settings: Any) -> Iterator[None]:
    """While a body is compiled; `settings`: further ones of Dynamo."""
    old = TorchVersion(torch.__version__) < "2.13"
    with torch._dynamo.config.patch({**_SETTINGS, **settings}), compared_by_value() if old else nullcontext():
        yield


@contextmanager
def compared_by_value() -> Iterator[None]:
    """While Inductor's search for tiles compares sizes by their values."""
    from torch._inductor import tiling_utils

    with mock.patch.object(tiling_utils, "get_pw_red_splits", _by_value(tiling_utils.get_pw_red_splits)):
        yield


def _by_value(splits: Callable[..., Any]) -> Callable[..., Any]:
    """Inductor's search for tiles of a fused kernel, given the number of points as its node has it, where it is equal.

    PyTorch 2.11 (its issue 181563) compares them as they are written, and fails on `batch * (text + image)`
    beside `batch * text + batch * image`: any sum of rows of tokens that are joined, in a batch.
    """
    from torch._inductor.utils import sympy_product
    from torch._inductor.virtualized import V

    def found(node: Any, points: Any, *rest: Any, **options: Any) -> Any:
        own = sympy_product(node._body.sizes[0])
        same = own != points and V.graph.sizevars.statically_known_equals(own, points)
        return splits(node, own if same else points, *rest, **options)

    return found
