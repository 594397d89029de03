"""Operators that exchange, for compiled code; importing registers them.

PyTorch's functional collective is two operators, each behind a function of Python for gradients, and runs on another
stream than the code around it. `exchange` is one, and calls the process group. A compiler keeps it as it is, but knows
no order of such calls, which must be the same on all ranks: so each takes what the one before gave, and none is left
out where a rank needs nothing of it. `begin` is the first of those two operators for code that exchanges by other ways
too, of whose order a compiler knows nothing either.

Tables are put together as messages outside of the compiled code: inside, the number of rows is a symbol, and a kernel
that writes messages in their order would divide by it for each element of each table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._C import _distributed_c10d as c10d
from torch.fx import has_side_effect

from xdit_ir.transport.packing import chunk_messages

_LIBRARY: Any = torch.library.Library("xdit_ir", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("exchange(Tensor x, Tensor[] after, SymInt[] coming, SymInt[] leaving, str group) -> Tensor")
_LIBRARY.define("exchange_tables(Tensor[] tables, Tensor[] after, SymInt[] coming, str group) -> Tensor")
_LIBRARY.define("begin(Tensor x, Tensor[] after, SymInt[] coming, SymInt[] leaving, str group) -> Tensor")
_LIBRARY.define("begin_gather(Tensor x, Tensor[] after, int count, str group) -> Tensor")
_LIBRARY.define("begin_sum(Tensor x, Tensor[] after, str group) -> Tensor")
_FUNCTIONAL: Any = torch.ops._c10d_functional
_RESOLVE: Any = c10d._resolve_process_group
_OPTIONS = c10d.AllToAllOptions()
_OPTIONS.asyncOp = False


def _exchange(
    x: torch.Tensor, after: Sequence[torch.Tensor], coming: list[int], leaving: list[int], group: str
) -> torch.Tensor:
    """`x [elements]`, of which `leaving` go to each member -> what comes from all, of `coming` elements."""
    room = x.new_empty(sum(coming))
    work = _RESOLVE(group).alltoall_base(room, x, coming, leaving, _OPTIONS)
    if work is not None:  # the backends of CPUs go on by themselves
        work.wait()
    return room


def _typed(
    x: torch.Tensor, after: Sequence[torch.Tensor], coming: Sequence[int], leaving: Sequence[int], group: str
) -> torch.Tensor:
    return x.new_empty(sum(coming))


def _exchange_tables(
    tables: Sequence[torch.Tensor], after: Sequence[torch.Tensor], coming: list[int], group: str
) -> torch.Tensor:
    """`tables`, each `[rows, columns]`, of whose columns each member gets an equal part -> as of `_exchange`."""
    messages = chunk_messages(tables, (0,) * len(tables), len(coming)).view(-1)
    return _exchange(messages, after, coming, [len(messages) // len(coming)] * len(coming), group)


def _typed_tables(
    tables: Sequence[torch.Tensor], after: Sequence[torch.Tensor], coming: Sequence[int], group: str
) -> torch.Tensor:
    return tables[0].new_empty(sum(coming))


def _begin(
    x: torch.Tensor, after: Sequence[torch.Tensor], coming: list[int], leaving: list[int], group: str
) -> torch.Tensor:
    """As `_exchange`, but what is returned must be waited for."""
    pending: torch.Tensor = _FUNCTIONAL.all_to_all_single(x, coming, leaving, group)
    return pending


def _begin_gather(x: torch.Tensor, after: Sequence[torch.Tensor], count: int, group: str) -> torch.Tensor:
    """`x [elements]` -> `[count * elements]`, to be waited for."""
    pending: torch.Tensor = _FUNCTIONAL.all_gather_into_tensor(x, count, group)
    return pending


def _typed_gather(x: torch.Tensor, after: Sequence[torch.Tensor], count: int, group: str) -> torch.Tensor:
    return x.new_empty(count * x.shape[0])


def _begin_sum(x: torch.Tensor, after: Sequence[torch.Tensor], group: str) -> torch.Tensor:
    """`x [...]` -> the sum of all members' `x`, to be waited for."""
    pending: torch.Tensor = _FUNCTIONAL.all_reduce(x, "sum", group)
    return pending


def _typed_sum(x: torch.Tensor, after: Sequence[torch.Tensor], group: str) -> torch.Tensor:
    return torch.empty_like(x)


for _name, _run, _fake in (
    ("exchange", _exchange, _typed),
    ("exchange_tables", _exchange_tables, _typed_tables),
    ("begin", _begin, _typed),
    ("begin_gather", _begin_gather, _typed_gather),
    ("begin_sum", _begin_sum, _typed_sum),
):
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"xdit_ir::{_name}", _fake, lib=_LIBRARY)
    has_side_effect(getattr(torch.ops.xdit_ir, _name).default)
