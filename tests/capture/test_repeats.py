"""Calls that repeat are traced once, and loops that write row by row become one write."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from xdit_ir import capture
from xdit_ir.capture import finish, repeats, rolled_loops
from xdit_ir.capture.attempt import Attempt
from xdit_ir.ir.program import Program, called_block

Check = Callable[..., Program]
aten = torch.ops.aten


@pytest.fixture(autouse=True)
def short_calls_are_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "LONG", 8)


class Tiles(nn.Module):
    """Tiles of one convolution, blended as autoencoders of diffusers do it."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.decoder = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1, dtype=dtype) for _ in range(4)))
        self.calls: list[int] | None = None

    def blend(self, above: torch.Tensor, tile: torch.Tensor, rows: int) -> torch.Tensor:
        for y in range(rows):
            tile[:, :, y, :] = above[:, :, y - rows, :] * (1 - y / rows) + tile[:, :, y, :] * (y / rows)
        return tile

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tiles = [self.decoder(x[:, :, start : start + 8]) for start in range(0, 24, 6)]
        return torch.cat([tiles[0], *(self.blend(a, b, 3) for a, b in pairwise(tiles))], 2)


def names(program: Program) -> list[str]:
    return [called_block(node) for node in program.calls]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_tiles_of_one_shape_are_calls_of_one_block_and_blending_them_is_one_write(
    dtype: torch.dtype, check: Check
) -> None:
    program = check(Tiles(dtype), (torch.randn(1, 3, 26, 5, dtype=dtype),))
    assert names(program) == ["Sequential"] * 4
    targets = [node.target for node in program.graph.nodes]
    assert targets.count(aten.slice_scatter.default) == 3
    assert aten.select_scatter.default not in targets


def test_a_tile_of_another_shape_is_another_block(check: Check) -> None:
    program = check(Tiles(), (torch.randn(1, 3, 23, 5),))
    assert names(program) == ["Sequential"] * 3 + ["Sequential_1"]


class Counted:
    """How often a method is called, which does what it did."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
        self.calls, method = 0, getattr(owner, name)

        def counted(*args: Any) -> Any:
            self.calls += 1
            return method(*args)

        monkeypatch.setattr(owner, name, counted)


def test_what_repeats_without_flops_needs_no_further_attempt_and_each_loop_is_looked_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attempts, loops = Counted(monkeypatch, Attempt, "run"), Counted(monkeypatch, rolled_loops._Loop, "roll")
    program = capture.trace(Tiles(), (torch.randn(1, 3, 26, 5),))
    assert names(program) == ["Sequential"] * 4
    assert (attempts.calls, loops.calls) == (2, 2)  # the loops of the first blend, and of all others


def test_a_trace_behind_what_forward_has_filled_knows_what_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fills(Tiles):
        rows = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.rows = x.shape[2]
            return super().forward(x)

    attempts = Counted(monkeypatch, Attempt, "run")
    assert names(capture.trace(Fills(), (torch.randn(1, 3, 26, 5),))) == ["Sequential"] * 4
    assert attempts.calls == 3


def test_what_cannot_be_a_block_from_its_second_call_on_is_recorded_each_time(check: Check) -> None:
    class Reads(Tiles):
        def blend(self, above: torch.Tensor, tile: torch.Tensor, rows: int) -> torch.Tensor:
            self.seen = [*getattr(self, "seen", ()), tile]
            return super().blend(above, tile, rows) + self.seen[0].mean()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            made = super().forward(x)
            del self.seen
            return made

    assert names(check(Reads(), (torch.randn(1, 3, 26, 5),))) == ["Sequential"] * 4


@pytest.mark.parametrize("long", [8, 100])
def test_long_bodies_are_blocks_though_their_work_is_small(
    long: int, monkeypatch: pytest.MonkeyPatch, check: Check
) -> None:
    class Uneven(Tiles):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            large, small = self.decoder(self.decoder(x)), self.decoder(self.decoder(x[:, :, :2, :2]))
            return torch.cat([large.flatten(2), small.flatten(2)], 2)

    monkeypatch.setattr(finish, "_LONG", long)
    program = check(Uneven(), (torch.randn(1, 3, 40, 40),))
    assert names(program) == ["Sequential"] * 2 + ["Sequential_1"] * (2 if long == 8 else 0)


def test_calls_that_leave_something_behind_are_recorded_one_by_one(check: Check) -> None:
    class Counts(Tiles):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: list[torch.Tensor] = []
            for _ in range(3):
                x = self.step(x, found)
            return x + sum(found)

        def step(self, x: torch.Tensor, found: list[torch.Tensor]) -> torch.Tensor:
            x = self.decoder(x).relu() * (len(found) + 1)
            found.append(x)
            return self.decoder(x) + x.tanh().sin().cos()

    program = check(Counts(), (torch.randn(1, 3, 8, 5),))
    assert names(program) == ["Sequential"] * 6


def test_a_method_that_reads_what_changes_is_traced_for_each_of_its_values(check: Check) -> None:
    class Grows(Tiles):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for factor in (1.0, 1.0, 2.0):
                self.factor = factor
                x = self.step(x)
            del self.factor
            return x

        def step(self, x: torch.Tensor) -> torch.Tensor:
            return self.decoder(x).sin().cos().tanh().relu().sin() * self.factor

    check(Grows(), (torch.randn(1, 3, 8, 5),))


class Frames(nn.Module):
    """Frames one after the other, as video decoders of diffusers take them: each call leaves features in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = Frame()
        self.kept: list[Any] = []

    def kept_for(self, frame: int) -> dict[str, Any]:
        return {"kept": self.kept, "at": [0]}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept = [None] * 4
        found = [self.decoder(x[:, :, i], **self.kept_for(i)) for i in range(x.shape[2])]
        self.kept = []
        return torch.stack(found, 2)


class Frame(nn.Module):
    """Each of four layers adds what it had of the frame before."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))

    def forward(self, x: torch.Tensor, kept: list[Any], at: list[int]) -> torch.Tensor:
        for layer in self.layers:
            new = layer(x).tanh()
            before = kept[at[0]]
            kept[at[0]] = "first" if before is None and at[0] == 0 else x.clone()
            at[0] += 1
            x = new + before.sin() if isinstance(before, torch.Tensor) else new
        return x


def test_calls_that_leave_features_in_lists_are_one_block_for_each_kind_of_step(check: Check) -> None:
    program = check(Frames(), (torch.randn(1, 3, 6, 8, 5),))
    assert names(program) == ["Frame", "Frame_1", *["Frame_2"] * 4]


def test_a_list_that_is_given_twice_is_followed_too(check: Check) -> None:
    class Twice(Frames):
        def kept_for(self, frame: int) -> dict[str, Any]:
            return {"kept": self.kept, "at": self.kept if frame < 0 else [0]} | {"again": self.kept}

    model = Twice()
    model.decoder.forward = lambda x, kept, at, again: Frame.forward(model.decoder, x, kept, at) + (again[1] is kept[1])
    check(model, (torch.randn(1, 3, 5, 8, 5),))


def test_a_list_that_the_module_holds_itself_is_followed_too(check: Check) -> None:
    class Held(Frame):
        def forward(self, x: torch.Tensor, kept: list[Any], at: list[int]) -> torch.Tensor:
            return super().forward(x, kept, at) + len([one for one in self.mine if one is not None])

    class Holds(Frames):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = Held()
            self.decoder.mine = []

        def kept_for(self, frame: int) -> dict[str, Any]:
            self.decoder.mine = self.kept
            return super().kept_for(frame)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            made = super().forward(x)
            self.decoder.mine = []
            return made

    check(Holds(), (torch.randn(1, 3, 5, 8, 5),))


LOOPS: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "of sums": lambda a, b: [b[:, i].copy_(a[:, i + 1] + b[:, i]) for i in range(3)],
    "of the row before": lambda a, b: [b[:, i + 1].copy_(b[:, i] * 0.5) for i in range(3)],
    "of what was written": lambda a, b: [b[:, i + 1].copy_(b[:, 0] + a[:, i]) for i in range(3)],
    "backwards": lambda a, b: [b[:, 3 - i].copy_(a[:, i]) for i in range(4)],
    "of other columns": lambda a, b: [b[:, i].copy_(a[i, :4]) for i in range(3)],
    "with another last step": lambda a, b: [b[:, i].copy_(a[:, i].sin() if i < 3 else a[:, i].cos()) for i in range(4)],
    "of every other row": lambda a, b: [b[:, i].copy_(a[:, 2 * i]) for i in range(2)],
    "read in between": lambda a, b: [b[:, i].copy_(a[:, i] + b.sum()) for i in range(3)],
    "of quotients": lambda a, b: [b[:, i].copy_(a[:, i] / (i + 3)) for i in range(4)],
    "of constants": lambda a, b: [b[:, i].fill_(i) for i in range(4)],
}


@pytest.mark.parametrize("loop", LOOPS)
def test_loops_give_the_same_bits(loop: str, check: Check) -> None:
    class Model(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            b = b * 1
            LOOPS[loop](a, b)
            return b

    check(Model(), (torch.randn(4, 4), torch.randn(4, 4)))
