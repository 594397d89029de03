"""A further resolution or length of text compiles nothing where blocks of such a structure were compiled before."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import xdit_ir as xir
import xdit_ir.transport.exchange_op  # registers an operator
from xdit_ir import models
from xdit_ir.emission import trial
from xdit_ir.emission.code_store import CodeStore
from xdit_ir.emission.code_writer import How
from xdit_ir.emission.codegen import Code, generate
from xdit_ir.emission.execution import Execution
from xdit_ir.emission.fold import fold_constants
from xdit_ir.emission.lifting import lift
from xdit_ir.emission.shared import one_form
from xdit_ir.emission.structure import Structure
from xdit_ir.emission.template import Template
from xdit_ir.ir.program import SPEC, TensorSpec
from xdit_ir.passes.base import run_passes
from xdit_ir.passes.contract import Pass
from xdit_ir.passes.pack_exchanges import PackExchanges
from xdit_ir.passes.use_copy_engines import UseCopyEngines

CPU = torch.device("cpu")


class Joint(nn.Module):
    """Text and image in one attention, and after it apart again, as slices."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.qkv, self.up, self.down = nn.Linear(dim, 3 * dim), nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, text: Tensor, image: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        count = text.shape[1]
        x = torch.cat([text, image], 1)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(q * rotary, k * rotary, v).transpose(1, 2).flatten(2)
        x = x + self.down(F.gelu(self.up(x)))
        return x[:, :count], x[:, count:]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Joint() for _ in range(3))

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        rotary = torch.arange(text.shape[1] + image.shape[1], dtype=text.dtype)[:, None] / 99 + torch.ones(8)
        for block in self.blocks:
            text, image = block(text, image, rotary)
        return torch.cat([text, image], 1)


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled here is counted, so nothing is taken from other processes."""
    monkeypatch.setattr(CodeStore, "of", lambda device: None)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def compile_by(backend: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another compiler, without options."""

    def compile(function: Any, options: Any = None, **given: Any) -> Any:
        return real(function, backend=backend, **given)

    real = torch.compile
    monkeypatch.setattr(torch, "compile", compile)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The graphs that are compiled; a compiler that compiles nothing is enough to count them."""
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compile_by(backend, monkeypatch)
    return graphs


def call(port: nn.Module, model: nn.Module, text: int, image: int, batch: int = 1) -> None:
    """Check a call with so many tokens."""
    generator = torch.Generator().manual_seed(text + image)
    given = [torch.randn(batch, count, 16, generator=generator) for count in (text, image)]
    torch.testing.assert_close(port(*given), model(*given), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_further_resolutions_texts_and_batches_compile_nothing(model: Model, compiled: list[Any]) -> None:
    port = xir.port(model, mode="compiled")
    call(port, model, 6, 24, batch=2)
    assert len(compiled) == 1
    for text, image, batch in ((6, 40, 2), (11, 24, 2), (7, 31, 2), (24, 6, 2), (6, 24, 3)):
        call(port, model, text, image, batch)
    assert len(compiled) == 1 and len(port.programs) == 6


@torch.no_grad()
def test_parts_of_one_token_have_code_of_their_own(model: Model, compiled: list[Any]) -> None:
    port = xir.port(model, mode="compiled")
    for text, image in ((6, 24), (1, 24), (1, 40), (5, 24)):
        call(port, model, text, image, batch=2)
    assert len(compiled) == 2, "one for any numbers of both, one for any of one beside a single one"


@torch.no_grad()
def test_what_cannot_be_compiled_for_any_shape_is_for_each(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[Any] = []
    failed: list[Any] = []

    def backend(graph: Any, given: Any) -> Callable[..., Any]:
        if any(isinstance(one, torch.SymInt) for one in given):
            failed.append(graph)
            raise ValueError("no symbols here")
        graphs.append(graph)
        return graph.forward

    compile_by(backend, monkeypatch)
    port = xir.port(model, mode="compiled")
    for text, image in ((6, 24), (7, 31), (6, 24)):
        call(port, model, text, image, batch=2)
    assert len(graphs) == 2 and len(failed) == 1


@torch.no_grad()
@pytest.mark.parametrize("text", [2, 8, 16, 24, 32, 48])
def test_as_many_tokens_as_something_else_has_are_no_danger(model: Model, text: int) -> None:
    """Numbers of tokens which equal that of heads, of features, of other tokens: no result is wrong."""
    options: dict[str, Any] = {"mode": "compiled"}
    port = xir.port(model, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **_: function)
        call(port, model, text, 24, batch=2)
        call(port, model, 7, 31, batch=2)
        call(port, model, text, 16, batch=2)


@torch.no_grad()
@pytest.mark.parametrize(("text", "image"), [(24, 24), (16, 32)])
def test_code_first_made_for_equal_numbers_serves_others(
    model: Model, compiled: list[Any], text: int, image: int
) -> None:
    """As many tokens of text as of an image, or as features, or heads have them."""
    port = xir.port(model, mode="compiled")
    for first, second in ((text, image), (7, 31), (31, 7)):
        call(port, model, first, second, batch=2)
    assert len(compiled) == 1


class Square(nn.Module):
    """Tokens as rows and columns, and back, beside what every feature is multiplied by."""

    def __init__(self, dim: int = 24) -> None:
        super().__init__()
        self.depthwise, self.out = nn.Conv2d(dim, dim, 3, padding=1, groups=dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, scales: Tensor, rows: int) -> Tensor:
        scale, gate = scales.chunk(2, -1)
        grid = (x * scale).unflatten(1, (rows, -1)).permute(0, 3, 1, 2)
        return x + gate * self.out(self.depthwise(grid).flatten(2).transpose(1, 2))


class Squares(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Square() for _ in range(3))

    def forward(self, x: Tensor, scales: Tensor) -> Tensor:
        rows, x = x.shape[2], x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, scales, rows)
        return x


@torch.no_grad()
@pytest.mark.parametrize("size", [(20, 20), (24, 24), (18, 24)])
def test_code_first_made_for_a_square_serves_others(compiled: list[Any], size: tuple[int, int]) -> None:
    """Rows are no columns, and tokens no features, where there are as many."""
    model = Squares().eval()
    port = xir.port(model, mode="compiled")
    for rows, columns in (size, (18, 30), (30, 18), (22, 22)):
        given = torch.randn(2, 24, rows, columns), torch.randn(2, 1, 48)
        torch.testing.assert_close(port(*given), model(*given), rtol=1e-5, atol=1e-5)
    assert len(compiled) == 1


@torch.no_grad()
def test_slices_of_one_sample_are_the_same_input_as_what_is_dense(model: Model, compiled: list[Any]) -> None:
    """The second block's inputs are parts of what the first returns; the stride of a single sample means nothing."""
    port = xir.port(model, mode="compiled")
    call(port, model, 6, 24)
    assert len(compiled) == 1


@torch.no_grad()
def test_the_recompilation_limit_is_never_hit(compiled: list[Any], model: Model) -> None:
    port = xir.port(model, mode="compiled")
    with torch._dynamo.config.patch(recompile_limit=1):
        for place, batch in enumerate((1, 2, 1, 2, 3)):
            call(port, model, 6 + place, 24 + 3 * place, batch)
    assert len(compiled) == 2


def test_one_form_of_inputs() -> None:
    x = torch.randn(1, 8, 4)
    part = x[:, 2:]
    assert part.stride() != one_form(part).stride() == (24, 4, 1) and one_form(part).data_ptr() == part.data_ptr()
    two = torch.randn(2, 8, 4)[:, 2:]
    assert torch.equal(one_form(two), two) and one_form(two).is_contiguous()
    for kept in (torch.randn(4, 1).expand(4, 8), torch.randn(2, 3, 4).transpose(1, 2)):
        assert one_form(kept) is kept, "what is repeated would grow, what is turned keeps its order"


def code(model: nn.Module, example: Any, rank: int, degrees: dict[str, int], *, how: str = "") -> Code:
    parallel = xir.trace(model, example).parallelize(**degrees)
    here = SimpleNamespace(mesh=parallel.mesh, rank=rank, timeout=timedelta(minutes=1), recordable=True)
    here.among = lambda members, beside=False: SimpleNamespace(group_name="0")
    first: list[Pass] = [PackExchanges()] if how == "packed" else []
    last: list[Pass] = [UseCopyEngines()] if how == "peers" else []
    lowered = run_passes(fold_constants(parallel.rank(rank)), [*first, *Execution(compile=True).passes(CPU), *last])
    return generate(lowered, here, CPU, How(at_once=how == "packed"))  # type: ignore[arg-type]


@pytest.fixture
def peer_operators() -> Iterator[None]:
    """Types of the operators that need CUDA."""
    with torch.library._scoped_library("xdit_ir", "FRAGMENT") as library:
        if not hasattr(torch.ops.xdit_ir, "peer_put"):
            where = "Tensor workspace, Tensor letter, str group, int place"
            library.define(f"peer_put(Tensor x, Tensor[] after, {where}, bool tell_self) -> Tensor")
            what = "SymInt[] shape, ScalarType dtype, bool sent, int patience"
            library.define(f"peer_wait(Tensor[] held, {where}, {what}) -> Tensor")
            library.impl("peer_put", lambda x, *_: x.new_empty(0, dtype=torch.uint8), "Meta")
            library.impl("peer_wait", lambda held, *rest: held[0].new_empty(rest[4], dtype=rest[5]), "Meta")
        yield


@pytest.mark.parametrize(
    ("degrees", "how"),
    [({"ulysses": 2}, ""), ({"ring": 2}, ""), ({"ulysses": 2}, "peers"), ({"ulysses": 2}, "packed")],
)
def test_a_rank_takes_any_part_of_tokens_from_the_others(
    peer_operators: None, degrees: dict[str, int], how: str
) -> None:
    """Exchanges are part of the structure: sizes of one's own part and those of each other rank are arguments."""
    model, example = models.load("plain-mmdit:tiny")

    def structures(height: int, text: int) -> list[Structure]:
        given = {**example, "x": torch.randn(2, 4, height, 44), "text": torch.randn(2, text, 32)}
        bodies = code(model, given, 1, degrees, how=how).bodies
        assert any(body.uses_mailbox for body in bodies.values()) == (how == "peers")
        found = [Structure.of(body.module) for body in bodies.values()]
        assert None not in found
        return [one for one in found if one is not None]

    for height, text in ((24, 24), (24, 264), (24, 64)):  # also as many as of the image, and as features
        for one, other in zip(structures(height, text), structures(26, 31), strict=True):
            template = Template.of(one.numbers, lift(one, CPU))
            assert one.key == other.key and one.numbers != other.numbers
            assert template.fits(one.numbers) and template.fits(other.numbers)


@torch.no_grad()
def test_what_the_compiler_makes_is_right_for_a_further_shape(model: Model) -> None:
    from torch._dynamo.utils import counters

    port = xir.port(model, mode="compiled")
    call(port, model, 6, 24)
    counters.clear()
    call(port, model, 7, 31)
    assert counters["stats"]["unique_graphs"] == 0


@torch.no_grad()
def test_a_trial_looks_into_blocks_of_each_structure_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a further shape of the same structure, blocks are called as they are."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(trial, "_waiting_is_an_error", nullcontext)
    port = xir.port(model, mode="compiled")
    tried: dict[Any, bool] = {}
    looked = []
    for text, image in ((6, 24), (7, 31)):
        given = [torch.randn(2, count, 16) for count in (text, image)]
        want = port(*given)
        runner = port._xdit_specialisations.found[0].runner
        tensors = [*given, *runner.bind(given, {})[1], *runner._runnables[0].constants]
        kinds = []
        for found in (tried, None):
            made = trial.Trial(runner.code.run, runner.code.unchanging, found)
            assert torch.equal(made.run(*tensors)[0], want)
            kinds.append({node.name: kind for node, kind in made.kinds()[1].items()})
        looked.append(len(tried))
        assert kinds[0] == kinds[1]
    assert looked == [1, 1]


def test_compiled_exchanges_have_one_order_on_all_ranks() -> None:
    """A compiler may turn round what does not depend on each other: each takes what the one before has given."""
    model, example = models.load("plain-mmdit:tiny")
    bodies = code(model, example, 0, {"ulysses": 2}, how="packed").bodies.values()
    for graph in (body.module.graph for body in bodies):
        starts = [node for node in graph.nodes if node.name.endswith("_start")]
        assert starts
        for before, after in itertools.pairwise(starts):
            assert any(source.args == (before, 0) for source in after.all_input_nodes if source.op == "call_function")


def test_a_body_that_is_given_several_values_as_one_is_compiled_for_itself() -> None:
    graph = fx.Graph()
    pair = graph.placeholder("pair")
    pair.meta[SPEC] = (TensorSpec((2, 3), torch.float32), TensorSpec((3,), torch.float32))
    graph.output(graph.call_function(operator.getitem, (pair, 0)))
    assert Structure.of(fx.GraphModule(nn.Module(), graph)) is None


def test_what_is_made_for_the_tokens_of_all_ranks_may_have_another_size() -> None:
    """As a mask of a text, joined with ones for an image of which a rank has a part: no value has so many."""

    def joined(text: int, image: int) -> Structure:
        graph = fx.Graph()
        mask = graph.placeholder("mask")
        mask.meta[SPEC] = TensorSpec((2, text), torch.bool)
        ones = graph.call_function(torch.ops.aten.ones.default, ([2, image],), {"dtype": torch.bool})
        graph.output((graph.call_function(torch.ops.aten.cat.default, ([mask, ones], 1)),))
        found = Structure.of(fx.GraphModule(nn.Module(), graph))
        assert found is not None
        return found

    first, further = joined(24, 64), joined(20, 48)
    assert Template.of(first.numbers, lift(first, torch.device("cpu"))).fits(further.numbers)
