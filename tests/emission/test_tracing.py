"""What the compiler is told where sizes are symbols, and how often it is asked for code that it cannot make."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._dynamo.source import ConstantSource
from torch._inductor import tiling_utils
from torch._inductor.graph import GraphLowering
from torch._inductor.sizevars import SizeVarAllocator
from torch._inductor.virtualized import V
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from xdit_ir.emission.code_store import CodeStore
from xdit_ir.emission.shared import SharedCodes
from xdit_ir.emission.tracing import compared_by_value
from xdit_ir.ir.program import SPEC, TensorSpec


def test_sizes_of_joined_rows_are_compared_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of text and image has as many rows, with the product written out or not; only equal sizes are taken."""
    given: list[Any] = []
    monkeypatch.setattr(tiling_utils, "get_pw_red_splits", lambda node, points, *rest, **_: given.append(points))
    shapes = ShapeEnv()
    batch, text, image = (
        shapes.create_symbol(size, ConstantSource(f"size_{size}"), DimDynamic.DYNAMIC) for size in (2, 3, 5)
    )
    node = SimpleNamespace(_body=SimpleNamespace(sizes=((batch, text + image), ())))
    written, other = batch * text + batch * image, batch * text * image
    assert written != batch * (text + image)
    with compared_by_value(), V.set_graph_handler(SimpleNamespace(sizevars=SizeVarAllocator(shapes))):  # type: ignore[arg-type]
        tiling_utils.get_pw_red_splits(node, written, text)  # type: ignore[arg-type]
        tiling_utils.get_pw_red_splits(node, other, text, none_if_not_divisible=True)  # type: ignore[arg-type]
    assert given == [batch * (text + image), other]


def body(tokens: int) -> fx.GraphModule:
    """One operator on so many rows."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta[SPEC] = TensorSpec((tokens, 8), torch.float32)
    graph.output((graph.call_function(torch.ops.aten.gelu.default, (x,)),))
    return fx.GraphModule(nn.Module(), graph)


@torch.no_grad()
def test_what_fails_with_symbols_is_compiled_with_them_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then for each shape alone: neither to keep the code nor to say why it cannot be kept, it is tried again."""
    compiled: list[bool] = []
    real = GraphLowering.run

    def run(self: GraphLowering, *given: Any) -> Any:
        compiled.append(any(isinstance(size, torch.SymInt) for size in given))
        if compiled[-1]:
            raise ValueError("no symbols here")
        return real(self, *given)

    monkeypatch.setattr(GraphLowering, "run", run)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    device = torch.device("cpu")
    codes = SharedCodes(device, store=CodeStore.of(device))
    for tokens in (5, 6):
        code = codes.of(body(tokens), {"deterministic": True})
        x = torch.randn(tokens, 8)
        assert code is not None
        torch.testing.assert_close(code(x)[0], nn.functional.gelu(x))
    assert compiled == [True, False, False]
